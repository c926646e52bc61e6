"""One small forward pass of a model that no adapter knows: what its repeated layers read, compute and return.

Shapes: ``B`` sequences of ``T`` tokens; tensors of a `Call` are ``[rows, width]``, one row per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...decomposition.attention import Attention, GatedAttention, NormedValues
from ...decomposition.routing import Routing
from ..capture.module_hooks import find_first, record_outputs, record_values_read
from ..capture.passes import attach_hook
from ..capture.run import find_switches, run_undisturbed
from ..spec.layer import LayerSpec
from .memory import find_memory_names, reads_memory
from .probe import Undetected, find_stacks, make_inputs
from .watch import Run, Watch

__all__ = ["Observed", "observe_again", "observe_layers", "read_run_routing"]

_SMALL_IDS, _SMALL_FEATURES = 1 << 11, 1 << 20
"""How many ids, and how many other numbers, are watched at once: all that a layer computes of them is held and
compared. Where a user passed more, small inputs that are made up are tried first."""


@dataclass(frozen=True)
class Observed:
    """``path`` from the model to the list of its layers, and one `Run` for each of those that attend, in order, with
    their numbers in the list; ``others`` are the rest.

    ``positions`` is the size of a learned position table, None where none was seen. ``given`` is what the model ran on.
    ``encoder`` are the layers to whose output these attend besides; None as well where that comes from elsewhere.
    """

    path: str
    runs: list[Run]
    numbers: tuple[int, ...]
    others: Mapping[int, nn.Module]
    positions: int | None
    given: Mapping[str, Any]
    encoder: Observed | None = None


def observe_layers(base: nn.Module, given: Mapping[str, Any] | None = None) -> Observed:
    """Run the model once, on ``given`` or else on a few tokens.

    Raises `Undetected`, and `CaptureError` for a model in training mode.
    """
    stacks = find_stacks(base)
    if not stacks:
        raise Undetected("it has no nn.ModuleList, nn.Sequential or nn.ModuleDict of blocks with projections in each")
    failures = []
    with run_undisturbed(base), _restore_modules(base):
        for kwargs in _order_inputs(base, given):
            watch = Watch(base, stacks)
            try:
                with watch.install_hooks():
                    base(**{**kwargs, **find_switches(base, kwargs)})
            except Exception as error:
                shapes = ((name, value) for name, value in kwargs.items() if isinstance(value, Tensor))
                words = ", ".join(f"{name} {list(value.shape)}" for name, value in shapes)
                failures.append(f"{words}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            else:
                return _find_layers(stacks, watch, kwargs)
    raise Undetected(
        f"it could not be run on {'a small input' if given is None else 'what was passed'} "
        f"({'; '.join(failures) or 'no input is known that it takes'})"
    )


def read_run_routing(run: Run, spec: LayerSpec) -> Routing | None:
    """Returns where a run sent its tokens, ``[B * T, k]``; None in a layer that is no mixture."""
    if spec.experts is None:
        return None
    weigher = None if spec.shared is None else spec.shared.weigher
    return replace(run.routings[spec.experts], gain=None if weigher is None else run.gains[weigher])


def observe_again(base: nn.Module, observed: Observed, specs: Sequence[LayerSpec]) -> None:
    """Have every run know the gate of its attention, the norm of its values, and what its cross-attention reads, where
    layers have these: by another forward pass, in which they are recorded."""
    gates = {i: spec.attention_gate for i, spec in enumerate(specs) if spec.attention_gate is not None}
    readers = {i: spec.cross.value_module for i, spec in enumerate(specs) if spec.cross is not None}
    norms = {i: spec.values for i, spec in enumerate(specs) if spec.values is not None}
    made: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    if not gates and not readers and not norms:
        return
    with (
        run_undisturbed(base),
        record_outputs({i: gate.gate_module for i, gate in gates.items()}, made.__setitem__),
        record_outputs({i: norm.value_module for i, norm in norms.items()}, values.__setitem__),
        record_values_read(readers, read.__setitem__),
    ):
        base(**{**observed.given, **find_switches(base, observed.given)})
    for number, states in read.items():
        observed.runs[number].states = states
    gains: list[tuple[int, type[NormedValues | GatedAttention], Tensor]] = []
    gains += [(number, NormedValues, norm.compute_gain(values[number])) for number, norm in norms.items()]
    gains += [(number, GatedAttention, gate.compute_gain(made[number])) for number, gate in gates.items()]
    for number, weigh, gain in gains:
        caller, attention = observed.runs[number].attention[0]
        gain = gain if gain.shape[0] == attention.shape[0] else gain.transpose(0, 1)
        observed.runs[number].attention[0] = (caller, weigh(attention, gain))


def _order_inputs(base: nn.Module, given: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yields what a user passed, and what is made up; first what is small, or has what nobody makes up."""
    made = list(make_inputs(base))
    if given is None:
        yield from made
    elif _is_small(given) or find_memory_names(given):
        yield given
        yield from made
    else:
        yield from made
        yield given


@contextmanager
def _restore_modules(base: nn.Module) -> Iterator[None]:
    """Undo what a forward pass makes of its own modules: BigBird gives up sparse attention where tokens are few."""
    before = [
        (module, dict(module._modules), {k: v for k, v in vars(module).items() if isinstance(v, (str, int, float))})
        for module in base.modules()
    ]

    def restore() -> None:
        for module, children, settings in before:
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
            vars(module).update(settings)

    with ExitStack() as stack, stack:
        for _ in range(2):  # should the first be interrupted
            stack.callback(restore)
        yield


def _is_small(given: Mapping[str, Any]) -> bool:
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    ids = sum(one.numel() for one in tensors if not one.is_floating_point())
    return ids <= _SMALL_IDS and sum(one.numel() for one in tensors) - ids <= _SMALL_FEATURES


def _find_layers(stacks: Mapping[str, Sequence[nn.Module]], watch: Watch, kwargs: Mapping[str, Any]) -> Observed:
    """Finds the one list of layers that attend, each once at the most and in order. Raises `Undetected`."""
    names = {id(module): name for name, module in watch.base.named_modules()}
    path, of_encoder = _choose_stacks(watch, names, kwargs)
    twice = of_encoder is not None or reads_memory(watch.base, watch.runs[path], kwargs)
    observed = _observe_stack(stacks[path], path, watch, names, kwargs, 2 if twice else 1)
    if of_encoder is None:
        return observed
    return replace(observed, encoder=_observe_stack(stacks[of_encoder], of_encoder, watch, names, kwargs, 1))


def _observe_stack(
    layers: Sequence[nn.Module],
    path: str,
    watch: Watch,
    names: Mapping[int, str],
    kwargs: Mapping[str, Any],
    attentions: int,
) -> Observed:
    """Returns the runs of a list of layers, each of which attends so many times or not at all."""
    runs = watch.runs[path]
    if any(run.input.is_meta for run in runs):
        raise Undetected("its weights are on the meta device; load them onto a real one first", path)
    if [id(run.layer) for run in runs] != [id(layer) for layer in layers]:
        raise Undetected(
            f"the {len(layers)} layers of {path!r} ran {len(runs)} times, expected once each, in order", path
        )
    for number, run in enumerate(runs):
        called = [repr(names[id(module)]) for module, _ in run.attention]
        if len(called) > attentions:
            _refuse_stages(watch, path, [names[id(module)] for module, _ in run.attention])
        if called and len(called) != attentions:
            expected = "once" if attentions == 1 else "to its own tokens and once more to the encoder's"
            raise Undetected(
                f"layer {number} of {path!r} attends {len(called)} times ({', '.join(called)}), expected {expected}",
                path,
            )
        if called and (run.input.dim() != 3 or run.output is None or run.input.shape != run.output.shape):
            raise Undetected(
                f"layer {number} of {path!r} takes {list(run.input.shape)}, expected [B, T, d] in and out"
                f"{_explain_axes(run)}",
                path,
            )
    numbers = tuple(number for number, run in enumerate(runs) if run.attention)
    others = {number: run.layer for number, run in enumerate(runs) if not run.attention}
    attending = [runs[number] for number in numbers]
    tokens = attending[0].attention[0][1].shape[2]
    return Observed(path, attending, numbers, others, watch.count_positions(tokens), kwargs)


def _explain_axes(run: Run) -> str:
    """Says what the four axes of a layer's input are, as far as its attention tells."""
    if run.input.dim() != 4 or run.output is None or run.input.shape != run.output.shape:
        return ""
    batch, _, tokens, _ = run.attention[0][1].shape
    sizes = list(run.input.shape[:-1])
    for axis in (0, 2, 1):
        rest = sizes[:axis] + sizes[axis + 1 :]
        if rest == [batch, tokens]:
            return (
                f": {sizes[axis]} streams of every token, which the layer mixes by numbers that it makes of them; the "
                "formulas follow one"
            )
    if sizes[0] * sizes[1] * sizes[2] == batch * tokens:
        return ": tokens in rows and columns"
    return " (are these tokens in rows and columns, or several streams that a layer mixes?)"


def _refuse_stages(watch: Watch, path: str, called: Sequence[str]) -> None:
    """Raises `Undetected` where a layer holds a list of blocks that attend: it is a stage, with tokens of its own."""
    stage, inside = len(path.split(".")) + 1, [name.split(".") for name in called]
    for place in range(stage + 1, min(map(len, inside))):
        numbers, lists = {parts[place] for parts in inside}, {tuple(parts[:place]) for parts in inside}
        if len(lists) == 1 and len(numbers) > 1 and all(number.isdecimal() for number in numbers):
            refused = Undetected(
                f"the modules of {path!r} are stages, each with blocks that attend ({'.'.join(lists.pop())!r}): every "
                "stage has tokens of its own, between which others are made of them, so that none is a layer of a list"
            )
            refused.owners = tuple(f"{path}.{number}" for number in range(len(watch.stacks[path])))
            raise refused


def _choose_stacks(watch: Watch, names: Mapping[int, str], kwargs: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns the path of the list of layers that attend: of several, the last one where each of the others makes some
    of its tokens, as the towers for images and sound of a language model do. Besides, the path of an encoder's layers,
    where the last ones attend to its tokens, too."""
    attending = [path for path in watch.order if any(run.attention for run in watch.runs[path])]
    if len(attending) > 1:
        *earlier, last = attending
        if _reads_encoder(watch, earlier[-1], last) and all(
            _feeds(watch, p, earlier[-1], kwargs) for p in earlier[:-1]
        ):
            return last, earlier[-1]
        if all(_feeds(watch, path, last, kwargs) for path in earlier):
            _require_whole_attention(watch.runs[last], last, names)
            return last, None
        for path in attending:
            _require_whole_attention(watch.runs[path], path, names)
        several = Undetected(f"it attends in more than one list of layers: {', '.join(map(repr, attending))}")
        several.owners = tuple(_find_owners(attending))
        raise several
    if not attending and watch.outside:
        module, attention = watch.outside[0]
        _require_single_keys(attention, f"{names[id(module)]!r} ({type(module).__name__})")
        raise Undetected(f"{names[id(module)]!r} ({type(module).__name__}) attends, but in no list of layers")
    if not attending:
        raise Undetected(
            "no attention was seen: nothing in it calls transformers' attention interface, nn.MultiheadAttention or "
            "scaled_dot_product_attention, or takes a softmax [B, heads, T, T] over keys (one over windows or blocks "
            "of them does not count)"
        )
    _require_whole_attention(watch.runs[attending[0]], attending[0], names)
    return attending[0], None


def _require_whole_attention(runs: Sequence[Run], path: str, names: Mapping[int, str]) -> None:
    """Raises `Undetected` where a layer ``[B, T, d]`` has no attention weights of every token to every token: windows,
    blocks, or keys that are made of several tokens."""
    for run in runs:
        if not run.attention:
            continue
        caller, attention = run.attention[0]
        batch, _, queries, _ = attention.shape
        where, shape = f"{names[id(caller)]!r} ({type(caller).__name__})", list(run.input.shape)
        if len(shape) == 3 and queries * attention.shape[1] == shape[2] and queries not in shape[:2]:
            raise Undetected(
                f"{where} attends from features to features, with weights of {list(attention.shape)} where the layer "
                f"reads {shape}: its weights mix no tokens",
                path,
            )
        if len(shape) == 3 and sorted(shape[:2]) != sorted((batch, queries)):
            raise Undetected(
                f"{where} attends in pieces, with weights of {list(attention.shape)} where the layer reads {shape}: in "
                "windows, blocks or chunks, which no formula here covers; where the configuration has full "
                "attention instead (attention_type, sizes of windows and blocks), that is covered",
                path,
            )
        _require_single_keys(attention, where, path)


def _require_single_keys(attention: Attention, where: str, path: str | None = None) -> None:
    """Raises `Undetected` for self-attention whose keys are fewer than its queries."""
    _, _, queries, keys = attention.shape
    if keys < queries:
        raise Undetected(
            f"{where} attends to {keys} keys for {queries} queries: a key is made of several tokens, so that no vector "
            "of a single one passes to the queries",
            path,
        )


def _reads_encoder(watch: Watch, encoder: str, last: str) -> bool:
    """Tells whether every layer that attends does so twice, by two modules, the second time to as many tokens as the
    layers of ``encoder`` have."""
    tokens = next(run.attention[0][1].shape[2] for run in watch.runs[encoder] if run.attention)
    runs = [run.attention for run in watch.runs[last] if run.attention]
    return all(len(one) == 2 and one[0][0] is not one[1][0] and one[1][1].shape[3] == tokens for one in runs)


def _find_owners(paths: Sequence[str]) -> list[str]:
    """Returns for each of several paths the largest part of the model that holds none of the others."""
    found = []
    for path in paths:
        parts = path.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        alone = (
            one for one in prefixes if not any(f"{other}.".startswith(f"{one}.") for other in paths if other != path)
        )
        found.append(next(alone, path))
    return found


def _feeds(watch: Watch, earlier: str, later: str, kwargs: Mapping[str, Any]) -> bool:
    """Tells whether what one list of layers returns becomes some of the tokens that another one reads, beside others:
    by another run in which it returns something else."""
    source, target = watch.runs[earlier][-1].layer, watch.runs[later][0]
    read: list[Tensor] = []

    def disturb(layer: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + output.roll(1, -1)
        return (output[0] + output[0].roll(1, -1), *output[1:])

    def note_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(find_first(layer, args, kwargs))

    with ExitStack() as stack, stack:
        attach_hook(stack, source.register_forward_hook, disturb)
        attach_hook(stack, target.layer.register_forward_pre_hook, note_input, with_kwargs=True)
        watch.base(**{**kwargs, **find_switches(watch.base, kwargs)})
    if not read or read[0].shape != target.input.shape:
        return False
    changed = (read[0] != target.input).any(-1)
    return bool(changed.any()) and not bool(changed.all())
