"""Results of models with an encoder and a decoder, and reading any result from its file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..errors import FileFormatError
from ..selection import layer_place
from . import serialise
from .attribution import Attribution
from .contributions import Contributions
from .files import read, write
from .kept.policy import Kept
from .scope_names import join_stack, split_stack

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from ..report import Panel

__all__ = ["STACKS", "StackedAttribution", "load"]

STACKS = ("encoder", "decoder", "cross")
V = TypeVar("V")


@dataclass(eq=False)
class StackedKept(Kept):
    """What is kept of several stacks of layers, by full names of scopes; each of ``parts`` is that of a stack."""

    parts: Mapping[str, Kept] = field(default_factory=dict)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Kept], block: int | None) -> StackedKept:
        """Puts together what was kept of each stack. ``block`` is that of all."""
        return cls(
            maps=_join_scopes({name: kept.maps for name, kept in parts.items()}),
            largest=_join_scopes({name: kept.largest for name, kept in parts.items()}),
            reduced=[value for kept in parts.values() for value in kept.reduced],
            block=block,
            parts=parts,
        )

    def can_save(self, scope: str) -> bool:
        stack, of_stack = split_stack(scope)
        return self.parts[stack].can_save(of_stack)

    def explain_no_map(self, scope: str) -> str:
        return self.parts[split_stack(scope)[0]].explain_no_map(scope)

    def explain_unsaved(self, scope: str) -> str:
        return self.parts[split_stack(scope)[0]].explain_unsaved(scope)


@dataclass(eq=False, repr=False)
class StackedAttribution(Attribution):
    """Maps of an encoder and a decoder, and of the attention between them, each in its own `Attribution`.

    ``stacks["encoder"]``: encoder tokens in encoder layers. In decoder layers, ``stacks["decoder"]`` is what decoder
    tokens bring to decoder tokens, and ``stacks["cross"]`` what encoder tokens bring to them: ``[L, B, N, T']``. From
    ``atb`` on, the vectors of both together and the bias add up to the decoder's stream.

    ``maps``, ``largest`` and ``bias`` hold all of them by ``"<stack>.<scope>"``, ``reduced`` lists them stack by
    stack; the other fields are the decoder's (or, where only the encoder was asked for, the encoder's).

    >>> import transformers
    >>> small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 8}
    >>> heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    >>> bart = transformers.BartModel(transformers.BartConfig(vocab_size=9, **small, **heads)).eval()
    >>> ids = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]]), "decoder_input_ids": torch.tensor([[3, 4, 5]])}
    >>> both = ffattr.attribute(bart, ids)
    >>> both.scopes
    ('encoder.atb_ff_res_ln', 'decoder.atb_ff_res_ln', 'cross.atb_ff_res_ln')
    >>> both["cross.layer"].shape  # [layers, batch, decoder token, encoder token]
    torch.Size([2, 1, 3, 5])
    >>> both.stacks["encoder"]
    Attribution(1 layers, 1 x 5 tokens, 5 queries, scopes: atb_ff_res_ln)
    """

    stacks: dict[str, Attribution] = field(default_factory=dict)

    @classmethod
    def of(cls, stacks: Mapping[str, Attribution]) -> StackedAttribution:
        """Puts together one `Attribution` for each stack that was asked for."""
        main = next(stacks[name] for name in ("decoder", "cross", "encoder") if name in stacks)
        return cls(
            kept=StackedKept.from_parts({name: stack.kept for name, stack in stacks.items()}, main.block),
            bias=_join_scopes({name: stack.bias for name, stack in stacks.items()}),
            tokens=main.tokens,
            labels=main.labels,
            layers=main.layers,
            queries=main.queries,
            scopes=tuple(join_stack(name, scope) for name, stack in stacks.items() for scope in stack.scopes),
            mask=main.mask,
            error=main.error,
            plan=main.plan,
            arguments=main.arguments,
            stacks=dict(stacks),
        )

    def scope(self, name: str) -> str:
        """Returns the full name of a computed scope, ``"decoder.atb"``; ``"cross.layer"`` is the last of its stack."""
        stack, scope = split_stack(name) if isinstance(name, str) else ("", "")
        if stack not in self.stacks:
            raise KeyError(
                f"no scope {name!r} here: begin it with one of {', '.join(f'{stack}.' for stack in self.stacks)} "
                f"Computed: {', '.join(self.scopes)}"
            )
        return join_stack(stack, self.stacks[stack].scope(scope))

    def __repr__(self) -> str:
        return f"StackedAttribution({', '.join(f'{name}: {stack!r}' for name, stack in self.stacks.items())})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `ffattr.load` reads: whole or not at all, never over half of an old one.

        Raises ValueError where there are no maps (keep=Reduce).
        """
        serialise.check_saved(self)
        tensors: dict[str, Tensor] = {}
        contents: dict[str, Any] = {}
        for name, stack in self.stacks.items():
            of_stack, contents[name] = serialise.to_parts(stack)
            tensors |= {f"{name}.{key}": tensor for key, tensor in of_stack.items()}
        write(path, tensors, {"stacks": contents})

    def to_pandas(self, scopes: str | Sequence[str] | None = None) -> pandas.DataFrame:
        """Lists rows like `Attribution.to_pandas`, with a column ``stack``; ``scopes`` are full names."""
        import pandas as pd

        by_stack = self._group_by_stack(scopes).items()
        frames = [self.stacks[stack].to_pandas(of).assign(stack=stack) for stack, of in by_stack]
        frame = pd.concat(frames, ignore_index=True)
        for column in ("stack", "scope", "query_token", "key_token"):
            frame[column] = frame[column].astype("category")
        return frame

    def plot(self, scope: str = "decoder.layer", layer: int = -1, batch: int = 0, **options: Any) -> Figure:
        """Draws like `Attribution.plot` a scope given by its full name."""
        stack, of_stack = split_stack(self.scope(scope))
        layers = self.stacks[stack].layers
        title = f"{stack}: {of_stack}, layer {layers[layer_place(layer, layers)]}"
        return self.stacks[stack].plot(of_stack, layer, batch, **{"title": title, **options})

    def to_xarray(self, scopes: str | Sequence[str] | None = None) -> Any:
        """Makes an `xarray.DataTree` with a dataset for each stack, see `Attribution.to_xarray`."""
        import xarray

        by_stack = self._group_by_stack(scopes)
        return xarray.DataTree.from_dict({stack: self.stacks[stack].to_xarray(of) for stack, of in by_stack.items()})

    def top(self, k: int = 10, scope: str = "decoder.layer", *, own: bool = False) -> pandas.DataFrame:
        """Lists pairs like `Attribution.top`, of a scope by its full name."""
        stack, of_stack = split_stack(self.scope(scope))
        return self.stacks[stack].top(k, of_stack, own=own)

    def _group_by_stack(self, scopes: str | Sequence[str] | None) -> dict[str, list[str]]:
        """Returns the asked scopes of every stack, without its name."""
        found: dict[str, list[str]] = {}
        for name in self._resolve_scopes(scopes):
            stack, scope = split_stack(name)
            found.setdefault(stack, []).append(scope)
        return found

    def compare(
        self, other: Attribution, scopes: str | Sequence[str | tuple[str, str]] | None = None
    ) -> pandas.DataFrame:
        """Compares like `Attribution.compare`, with a column ``stack``; ``scopes`` are full names, or pairs of them."""
        import pandas as pd

        if not isinstance(other, StackedAttribution):
            raise TypeError(f"these are maps of an encoder and a decoder, the others an {type(other).__name__}")
        frames = []
        for mine, theirs in self._pair_scopes(other, scopes):
            (stack, scope), (across, other_scope) = split_stack(mine), split_stack(theirs)
            if stack != across:
                raise ValueError(f"{mine} and {theirs} are maps of different tokens: compare scopes of one stack")
            found = self.stacks[stack].compare(other.stacks[stack], [(scope, other_scope)])
            frames.append(found.assign(stack=stack))
        return pd.concat(frames, ignore_index=True)

    def to_words(
        self, *, keys: str = "sum", queries: str = "mean", words: Sequence[Sequence[int | None]] | None = None
    ) -> StackedAttribution:
        """Merges every stack like `Attribution.to_words`; without ``words``, which differ between them."""
        if words is not None:
            raise ValueError("words= is for one stack: attr.stacks[name].to_words(words=...)")
        return StackedAttribution.of(
            {n: stack.to_words(keys=keys, queries=queries) for n, stack in self.stacks.items()}
        )

    def _make_panels(self, scopes: Sequence[str]) -> list[Panel]:
        from . import pages

        return [
            p
            for stack, of in self._group_by_stack(scopes).items()
            for p in pages.make_panels(self.stacks[stack], of, stack)
        ]

    def _repr_html_(self) -> str:
        return "".join(f"<p>{name}</p>{stack._repr_html_()}" for name, stack in self.stacks.items())

    def of_expert(self, number: int | str, scope: str | None = None) -> Tensor:
        """Returns what `Attribution.of_expert` does, of a scope by its full name."""
        stack, of_stack = split_stack(self.scope(scope or ""))
        return self.stacks[stack].of_expert(number, of_stack)


def load(path: str | os.PathLike[str], *, verify: bool = True) -> Attribution | Contributions:
    """Reads a file that ``save`` or `ffattr.Dense` wrote; tensors come back on the CPU, ``plan`` as a string.

    What comes back is what was saved: an `Attribution`, a `StackedAttribution` or `Contributions`. The tensors are
    mapped into memory. ``verify`` compares all of them with the checksum that was saved with them; without it, of a
    large file only what is looked at is read, and damage goes unnoticed.

    Raises `FileNotFoundError`, or `FileFormatError` that says whether the file is damaged, foreign or too new.

    >>> attr.save("maps.safetensors")
    >>> ffattr.load("maps.safetensors").tokens[1]
    ['[CLS]', 'dog', '##s', 'bark', '##ing', '.', '[SEP]', '[PAD]', '[PAD]']
    """
    tensors, content = read(path, verify)
    name = os.fspath(path)
    if isinstance(content, dict) and content.get("kind") == "contributions":
        return Contributions.from_parts(tensors, content, name)
    if not isinstance(content, dict) or "stacks" not in content:
        return _restore_attribution(tensors, content, name)
    parts = content["stacks"]
    if not isinstance(parts, dict) or not parts or not parts.keys() <= set(STACKS):
        raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles 'stacks'")
    stacks = {}
    for stack, part in parts.items():
        prefix = f"{stack}."
        of_stack = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        stacks[stack] = _restore_attribution(of_stack, part, name)
    return StackedAttribution.of(stacks)


def _join_scopes(stacks: Mapping[str, Mapping[str, V]]) -> dict[str, V]:
    """Returns what there is of the scopes of every stack, by full names."""
    return {join_stack(stack, scope): value for stack, scopes in stacks.items() for scope, value in scopes.items()}


def _restore_attribution(tensors: Mapping[str, Tensor], content: Any, name: str) -> Attribution:
    return Attribution(**vars(serialise.from_parts(tensors, content, name)))
