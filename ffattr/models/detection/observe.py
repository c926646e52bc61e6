"""One small forward pass of a model that no adapter knows: what its repeated layers read, compute and return.

Shapes: ``B`` sequences of ``T`` tokens; tensors of a `Call` are ``[rows, width]``, one row per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...decomposition.attention import Attention
from ..capture.attention_hooks import record_attention
from ..capture.run import find_switches, run_undisturbed
from .probe import BATCH, TOKENS, Undetected, find_stacks, make_inputs, refuse_experts

__all__ = ["Call", "Observed", "Run", "observe_layers"]

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "h")


@dataclass(frozen=True)
class Call:
    """One call of a module inside a layer, by its path from there: the tensor it read, the one it returned."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass
class Run:
    """One run of a layer: its input and output as they were, and what happened in between, in order.

    ``calls`` are in the order in which they ended, and of the last layer only.
    """

    layer: nn.Module
    input: Tensor
    output: Tensor | None = None
    attention: list[tuple[nn.Module, Attention]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Observed:
    """``path`` from the model to the list of its layers, and one `Run` for each of them, in order.

    ``positions`` is the size of a learned position table, None where none was seen.
    """

    path: str
    runs: list[Run]
    positions: int | None


def observe_layers(base: nn.Module) -> Observed:
    """Run the model once on a few tokens. Raises `Undetected`, and `CaptureError` for a model in training mode."""
    stacks = find_stacks(base)
    if not stacks:
        raise Undetected("it has no nn.ModuleList or nn.Sequential of layers that are all of one class")
    for path, layers in stacks.items():
        for number, layer in enumerate(layers):
            refuse_experts(layer, path, number)
    failures = []
    with run_undisturbed(base), _restore_modules(base):
        for kwargs in make_inputs(base):
            watch = _Watch(base, stacks)
            try:
                with watch.install_hooks():
                    base(**{**kwargs, **find_switches(base, kwargs)})
            except Exception as error:
                given = ", ".join(f"{name} {list(value.shape)}" for name, value in kwargs.items())
                failures.append(f"{given}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            else:
                path = _find_stack(stacks, watch)
                return Observed(path, watch.runs[path], watch.count_positions())
    raise Undetected(
        f"it could not be run on a small input ({'; '.join(failures) or 'no input is known that it takes'})"
    )


@contextmanager
def _restore_modules(base: nn.Module) -> Iterator[None]:
    """Undo what a forward pass makes of its own modules: BigBird gives up sparse attention where tokens are few."""
    before = [
        (module, dict(module._modules), {k: v for k, v in vars(module).items() if isinstance(v, (str, int, float))})
        for module in base.modules()
    ]
    try:
        yield
    finally:
        for module, children, settings in before:
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
            vars(module).update(settings)


class _Watch:
    """Hooks on the layers of every stack, on all modules of the last one, and on everything that may attend."""

    def __init__(self, base: nn.Module, stacks: Mapping[str, Sequence[nn.Module]]) -> None:
        self.base = base
        self.stacks = stacks
        self.runs: dict[str, list[Run]] = {path: [] for path in stacks}
        self.outside: list[nn.Module] = []
        self._running: list[Run] = []
        self._entered: list[Tensor | None] = []
        self._tables: list[tuple[nn.Embedding, Tensor]] = []

    def install_hooks(self) -> ExitStack:
        with ExitStack() as stack:  # undone at once where a hook cannot be installed
            for path, layers in self.stacks.items():
                for layer in {id(layer): layer for layer in layers}.values():
                    stack.callback(
                        layer.register_forward_pre_hook(self._make_begin_hook(path), with_kwargs=True).remove
                    )
                    stack.callback(layer.register_forward_hook(self._end_run).remove)
                for name, module in layers[-1].named_modules():
                    if name:
                        stack.callback(module.register_forward_pre_hook(self._enter_module, with_kwargs=True).remove)
                        stack.callback(module.register_forward_hook(self._make_leave_hook(name)).remove)
            for module in self.base.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_pre_hook(self._note_lookup).remove)
            modules = dict(enumerate(self.base.modules()))
            heads = {i: self._count_heads(module) for i, module in modules.items()}

            def record_call(index: int, attention: Attention) -> None:
                self._note_attention(modules[index], attention)

            stack.enter_context(record_attention(self.base, modules, heads, record_call, wrappers=False))
            return stack.pop_all()

    def _count_heads(self, module: nn.Module) -> int:
        """Returns the number of heads that a softmax over keys is known by; one that none has where it is unknown."""
        sources = (module, getattr(module, "config", None), getattr(self.base, "config", None))
        found = (getattr(source, name, None) for source in sources for name in _HEADS)
        return next((number for number in found if isinstance(number, int) and number > 0), 1 << 30)

    def _make_begin_hook(self, path: str) -> Callable[..., None]:
        def begin_run(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
            if not isinstance(hidden, Tensor):
                raise Undetected(f"a {type(layer).__name__} takes no tensor first but a {type(hidden).__name__}")
            run = Run(layer, hidden.clone())
            self.runs[path].append(run)
            self._running.append(run)

        return begin_run

    def _end_run(self, layer: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        self._running.pop().output = first.clone()

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self._entered.append(None if given is None else given.clone())  # an activation may work in place

    def _make_leave_hook(self, path: str) -> Callable[..., None]:
        def note_call(module: nn.Module, args: Any, output: Any) -> None:
            given = self._entered.pop()
            found = output[0] if isinstance(output, tuple) and output else output
            if self._running and given is not None and isinstance(found, Tensor):
                self._running[-1].calls.append(Call(path, module, given, found.clone()))

        return note_call

    def _note_lookup(self, table: nn.Embedding, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._tables.append((table, args[0].clone()))

    def _note_attention(self, module: nn.Module, attention: Attention) -> None:
        if not self._running:
            self.outside.append(module)
            return
        self._running[-1].attention.append((module, attention))

    def count_positions(self) -> int | None:
        """Counts the rows of the table in which the tokens of a sequence looked up one row after the other."""
        for table, ids in self._tables:
            if ids.dim() in (1, 2) and ids.shape[-1] == TOKENS and (ids.dim() == 1 or ids.shape[0] in (1, BATCH)):
                row = ids.view(-1, TOKENS)[-1]
                if bool((row == row[0] + torch.arange(TOKENS, device=row.device)).all()):
                    return table.num_embeddings - int(row[0])
        return None


def _find_stack(stacks: Mapping[str, Sequence[nn.Module]], watch: _Watch) -> str:
    """Returns the path of the one list of layers that attend, each exactly once, in order."""
    names = {id(module): name for name, module in watch.base.named_modules()}
    attending = [path for path, runs in watch.runs.items() if any(run.attention for run in runs)]
    if len(attending) > 1:
        raise Undetected(f"it attends in more than one list of layers: {', '.join(map(repr, attending))}")
    if not attending and watch.outside:
        module = watch.outside[0]
        raise Undetected(f"{names[id(module)]!r} ({type(module).__name__}) attends, but in no list of equal layers")
    if not attending:
        raise Undetected(
            "no attention was seen: nothing in it calls transformers' attention interface, nn.MultiheadAttention or "
            "scaled_dot_product_attention, or takes a softmax over keys"
        )
    (path,) = attending
    runs, layers = watch.runs[path], stacks[path]
    if any(run.input.is_meta for run in runs):
        raise Undetected("its weights are on the meta device; load them onto a real one first", path)
    if [id(run.layer) for run in runs] != [id(layer) for layer in layers]:
        raise Undetected(
            f"the {len(layers)} layers of {path!r} ran {len(runs)} times, expected once each, in order", path
        )
    for number, run in enumerate(runs):
        called = [repr(names[id(module)]) for module, _ in run.attention]
        if len(called) != 1:
            several = f"attends {len(called)} times ({', '.join(called)})" if called else "does not attend"
            raise Undetected(f"layer {number} of {path!r} {several}, expected once", path)
        if run.input.dim() != 3 or run.output is None or run.input.shape != run.output.shape:
            raise Undetected(
                f"layer {number} of {path!r} takes {list(run.input.shape)}, expected [B, T, d] in and out", path
            )
    return path
