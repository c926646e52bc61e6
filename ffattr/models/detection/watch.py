"""One forward pass, watched: what the layers of every list read, compute and return.

Shapes: ``B`` sequences of ``T`` tokens; tensors of a `Call` are ``[rows, width]``, one row per token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...decomposition.attention import Attention, AttentionWeights
from ...decomposition.routing import Routing
from ..capture.attention_hooks import record_attention
from ..capture.module_hooks import find_first
from ..capture.passes import attach_hook
from .probe import Undetected

__all__ = ["Call", "Run", "Watch"]

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "h")


@dataclass(frozen=True)
class Call:
    """One call of a module inside a layer, by its path from there: the tensor it read, the one it returned.

    ``others`` are the tensors that it was called with besides.
    """

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor
    others: tuple[Tensor, ...] = ()


@dataclass
class Run:
    """One run of a layer: its input and output as they were, and what happened in between, in order.

    ``calls`` are in the order in which they ended, and of the last layer of each `kind` that attends only.
    ``routings`` are the experts and weights that a module was called with, ``gains`` the sigmoid of the one number that
    a module made of every token. ``states`` is what cross-attention reads, where that was recorded.
    """

    layer: nn.Module
    input: Tensor
    output: Tensor | None = None
    attention: list[tuple[nn.Module, Attention]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    routings: dict[nn.Module, Routing] = field(default_factory=dict)
    gains: dict[nn.Module, Tensor] = field(default_factory=dict)
    states: Tensor | None = None

    @cached_property
    def kind(self) -> Hashable:
        """What layers have in common that the same description fits: modules by name, and the shapes of matrices."""
        shapes = ((name, tuple(one.shape)) for name, one in self.layer.named_parameters() if one.dim() > 1)
        return (*(name for name, _ in self.layer.named_modules()), *shapes)


class Watch:
    """Hooks on the layers of every stack, on all modules of the last one, and on everything that may attend."""

    def __init__(self, base: nn.Module, stacks: Mapping[str, Sequence[nn.Module]]) -> None:
        self.base = base
        self.stacks = stacks
        self.runs: dict[str, list[Run]] = {path: [] for path in stacks}
        self.outside: list[tuple[nn.Module, Attention]] = []
        self._running: list[Run] = []
        self._entered: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
        self._tables: list[tuple[nn.Embedding, Tensor]] = []
        self.order: list[str] = []  # of the stacks, as they run first

    @contextmanager
    def install_hooks(self) -> Iterator[None]:
        with ExitStack() as stack, stack:
            for path, layers in self.stacks.items():
                for layer in {id(layer): layer for layer in layers}.values():
                    begin, end = self._make_begin_hook(path), self._make_end_hook(path)
                    attach_hook(stack, layer.register_forward_pre_hook, begin, with_kwargs=True)
                    attach_hook(stack, layer.register_forward_hook, end)
                for layer in {id(layer): layer for layer in layers}.values():
                    for name, module in layer.named_modules():
                        if name:
                            enter, leave = self._enter_module, self._make_leave_hook(name)
                            attach_hook(stack, module.register_forward_pre_hook, enter, with_kwargs=True)
                            attach_hook(stack, module.register_forward_hook, leave)
            for module in self.base.modules():
                if isinstance(module, nn.Embedding):
                    attach_hook(stack, module.register_forward_pre_hook, self._note_lookup)
            modules = dict(enumerate(self.base.modules()))
            heads = {i: -self._count_heads(module) for i, module in modules.items()}  # a guess

            def record_call(index: int, attention: Attention) -> None:
                self._note_attention(modules[index], attention)

            stack.enter_context(record_attention(self.base, modules, heads, record_call, wrappers=False))
            stack.enter_context(_Products(self._note_product))
            yield

    def _count_heads(self, module: nn.Module) -> int:
        """Returns the number of heads by which a softmax over keys is told where heads and sequences share an axis;
        0 where it is unknown."""
        sources = (module, getattr(module, "config", None), getattr(self.base, "config", None))
        found = (getattr(source, name, None) for source in sources for name in _HEADS)
        return next((number for number in found if isinstance(number, int) and number > 0), 0)

    def _make_begin_hook(self, path: str) -> Callable[..., None]:
        def begin_run(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = find_first(layer, args, kwargs)
            if not isinstance(hidden, Tensor):
                raise Undetected(f"a {type(layer).__name__} takes no tensor first but a {type(hidden).__name__}")
            run = Run(layer, hidden.clone())
            if path not in self.order:
                self.order.append(path)
            self.runs[path].append(run)
            self._running.append(run)

        return begin_run

    def _make_end_hook(self, path: str) -> Callable[..., None]:
        def end_run(layer: nn.Module, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0] if isinstance(output, (tuple, list)) else None
            run = self._running.pop()
            run.output = first.clone() if isinstance(first, Tensor) else None
            if run.attention:
                for other in self.runs[path]:
                    if other is not run and other.kind == run.kind:
                        other.calls.clear()
            else:
                run.calls.clear()

        return end_run

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        kept = tuple(value.clone() for value in given[:3])  # an activation may work in place
        self._entered.append((module, kept))

    def _make_leave_hook(self, path: str) -> Callable[..., None]:
        def note_call(module: nn.Module, args: Any, output: Any) -> None:
            _, given = self._entered.pop()
            found = output[0] if isinstance(output, tuple) and output else output
            if self._running and given and isinstance(found, Tensor):
                self._note_routing(module, given, found)
                self._running[-1].calls.append(Call(path, module, given[0], found.clone(), given[1:]))

        return note_call

    def _note_routing(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps what may send tokens to experts, and what may weigh a network beside them."""
        numbers = [one for one in given[1:] if not one.is_floating_point() and one.dim() == 2]
        weights = [one for one in given[1:] if numbers and one.is_floating_point() and one.shape == numbers[0].shape]
        if len(numbers) == len(weights) == 1:
            self._running[-1].routings[module] = Routing(numbers[0].long(), weights[0])
        if output.dim() > 1 and output.shape[-1] == 1 and output.is_floating_point():
            self._running[-1].gains[module] = output.sigmoid().flatten()

    def _note_product(self, weight: Tensor, read: Tensor, made: Tensor) -> None:
        """Keeps a product with the weight of a module that is not called itself (timm's BEiT and EVA-02)."""
        own = bool(self._entered) and getattr(self._entered[-1][0], "weight", None) is weight
        if own or not self._running:  # its module is called, and seen
            return
        run = self._running[-1]
        owner = next((one for one in run.layer.named_modules() if getattr(one[1], "weight", None) is weight), None)
        if owner is not None and not any(module is owner[1] for module, _ in self._entered):
            path, module = owner
            run.calls.append(Call(path, module, read.clone(), made.clone()))

    def _note_lookup(self, table: nn.Embedding, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._tables.append((table, args[0].clone()))

    def _note_attention(self, module: nn.Module, attention: Attention) -> None:
        if not self._running:
            self.outside.append((module, attention))
            return
        run = self._running[-1]
        batch, _, queries, keys = attention.shape
        tokens = run.input.shape[:2].numel()
        if queries != keys and queries * batch < tokens and tokens % (queries * batch) == 0 and batch == 1:
            return  # a router's softmax, whose first axis is taken for heads
        run.attention.append((module, _split_heads(attention, run.input)))

    def count_positions(self, tokens: int) -> int | None:
        """Counts the rows of the table in which the tokens of a sequence looked up one row after the other."""
        for table, ids in self._tables:
            if ids.dim() in (1, 2) and ids.shape[-1] == tokens > 2:
                row = ids.reshape(-1, tokens)[-1]
                if bool((row == row[0] + torch.arange(tokens, device=row.device)).all()):
                    return table.num_embeddings - int(row[0])
        return None


class _Products(TorchFunctionMode):
    """Hands every product of ``F.linear`` to ``sink(weight, read, made)``."""

    def __init__(self, sink: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._sink = sink

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            self._sink(given["weight"], given["input"], made)
        return made


def _split_heads(attention: Attention, hidden: Tensor) -> Attention:
    """Returns attention weights ``[B, H, T, T]`` of those in which heads and sequences lie on one axis, told apart by
    the layer's input ``hidden`` ``[B, T, d]`` or ``[T, B, d]``."""
    rows, heads, tokens, _ = attention.shape
    if not isinstance(attention, AttentionWeights) or heads != 1 or hidden.dim() != 3:
        return attention
    batch = hidden.shape[0] if hidden.shape[1] == tokens else hidden.shape[1]
    if rows % batch:
        return attention
    return AttentionWeights(attention.alpha.view(batch, -1, tokens, tokens))
