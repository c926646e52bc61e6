"""Which module plays which part in a layer, told by equal values among what its modules read and returned.

The value projection is the one whose output, mixed by the attention weights, is the input of another, and so on. All
tensors are ``[rows, width]``, one row per token, on the CPU in float32 or wider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from ...decomposition.activations import ACTIVATIONS, Activation
from .observe import Call, Run
from .probe import Undetected

__all__ = ["Cut", "Part", "Product", "match_parts"]

# Relative differences of two tensors that rounding explains: of a sum, an activation or a product, and of attention,
# whose weights may have been made in float32 whatever the model's dtype.
_EQUAL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_MIXED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Cut:
    """`ffattr.Columns` of the projection at ``path``."""

    path: str
    start: int
    stop: int
    groups: int = 1


@dataclass(frozen=True)
class Product:
    """`ffattr.models.spec.weights.Scaled`: the projection at ``path`` and the parameter at ``factor``."""

    path: str
    factor: str


Part = str | Cut | Product | Activation | int | None
"""A field of `LayerSpec`: a path from the layer, something made of one, a function that has no path, or a number."""


def match_parts(run: Run, parts: dict[str, Part]) -> bool:
    """Fill in all fields of `LayerSpec` but ``module`` as they are found; returns whether batches come first.

    Raises `Undetected`.
    """
    reader = _Reader(run)
    reader.match_all(parts)
    return reader.batch_first


class _Reader:
    def __init__(self, run: Run) -> None:
        assert run.output is not None
        self.layer = run.layer
        self.device, self.dtype = run.input.device, run.input.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        ((self.caller, self.attention),) = run.attention
        self.batch, self.heads, self.length, keys = self.attention.shape
        if self.length != keys or self.dtype not in _EQUAL:
            raise Undetected(
                f"attention has {self.length} queries and {keys} keys, hidden states are {self.dtype}; expected as "
                "many keys as queries and a float type"
            )
        self.batch_first = tuple(run.input.shape[:2]) == (self.batch, self.length)
        self.x, self.y = self.flatten_rows(run.input), self.flatten_rows(run.output)
        times = Counter(call.path for call in run.calls)
        calls = (
            Call(call.path, call.module, self.flatten_rows(call.input), self.flatten_rows(call.output))
            for call in run.calls
            if times[call.path] == 1 and call.input.dim() and call.output.dim()
        )
        of_tokens = [call for call in calls if len(call.input) == len(call.output) == len(self.x)]
        order = {path: place for place, (path, _) in enumerate(run.layer.named_modules())}
        self.calls = sorted(of_tokens, key=lambda call: order[call.path])  # a wrapper before what it wraps
        self.linears = [call for call in self.calls if _is_linear(call.module)]
        self.norms = [call for call in self.calls if _is_norm(call.module)]

    def flatten_rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", self.wide)

    def split_sequences(self, rows: Tensor) -> Tensor:
        """Returns rows ``[B * T, width]`` as ``[B, T, width]``, whichever of the two comes first in the model."""
        if self.batch_first:
            return rows.view(self.batch, self.length, -1)
        return rows.view(self.length, self.batch, -1).transpose(0, 1)

    def measure_error(self, found: Tensor, expected: Tensor) -> float:
        if found.shape != expected.shape:
            return float("inf")
        return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(self.wide).tiny))

    def are_equal(self, found: Tensor, expected: Tensor) -> bool:
        return self.measure_error(found, expected) <= _EQUAL[self.dtype]

    def apply_norms(self, tensor: Tensor) -> Iterator[tuple[str | None, Tensor]]:
        """Yields the tensor as it is, and what each norm that reads it makes of it."""
        yield None, tensor
        yield from ((call.path, call.output) for call in self.norms if self.are_equal(call.input, tensor))

    def match_all(self, parts: dict[str, Part]) -> None:
        path = next((path for path, module in self.layer.named_modules() if module is self.caller), None)
        if path is None:
            raise Undetected(f"attention is computed by a {type(self.caller).__name__} that is no part of the layer")
        parts |= {"attention": path, "heads": self.heads}
        value, out = self.match_attention(parts)
        before = [norm for norm, tensor in self.apply_norms(self.x) if self.are_equal(tensor, value.input)]
        if not before:
            raise Undetected(f"the value projection {value.path!r} reads neither the layer's input nor a norm of it")
        parts["norm_before_attn"] = before[0]
        blocks = sorted(self.find_ff_blocks(out), key=lambda block: block[0])
        if not blocks:
            raise Undetected(
                "no feed-forward block down(act(up(t))) or down(act(gate(t)) * up(t)) was found: no projection but "
                f"{out.path!r} reads an activation of another one's output"
            )
        parts |= blocks[0][3]
        for _, up, down, block in blocks:
            projections = str(parts["out"]), down.path
            for streams in self.match_streams(projections, out.output, up.input, down.output):
                parts |= {**block, **streams}
                return
        raise Undetected(
            "the layer's output is not the sum of its input, attention and feed-forward block with norms before, on or "
            "after them (is a residual scaled, or is there one branch more?)"
        )

    def match_attention(self, parts: dict[str, Part]) -> tuple[Call, Call]:
        """Returns the value and the output projection, and notes them in ``parts``."""
        if isinstance(self.caller, nn.MultiheadAttention):
            path, width = str(parts["attention"]), self.caller.embed_dim
            call = next((call for call in self.calls if call.path == path), None)
            if call is not None and self.caller.in_proj_weight is not None:
                projection = f"{path}.out_proj" if path else "out_proj"
                parts |= {"kv_heads": self.heads, "value": Cut(path, 2 * width, 3 * width), "out": projection}
                return call, call
        alpha = self.read_alpha()
        for out, value in product(self.linears, self.linears):
            starts = None if value is out else self.find_value_starts(alpha, value.output, out.input)
            if starts is not None:
                parts |= {"out": out.path, **self.describe_value(value, starts, out.input.shape[1] // self.heads)}
                return value, out
        raise Undetected(
            "no projection reads what attention makes of another one's output (does something act on the values, or "
            "on what attention returns?)"
        )

    def read_alpha(self) -> Tensor:
        """Returns attention weights ``[B, H, T, T]``."""
        tokens = torch.arange(self.length, device=self.device)
        sequences = (self.attention.sequence(batch, tokens, self.wide) for batch in range(self.batch))
        return torch.stack([sequence.attention_weights(tokens) for sequence in sequences]).cpu()

    def find_value_starts(self, alpha: Tensor, values: Tensor, mixed: Tensor) -> list[int] | None:
        """Returns the first of the columns of ``values`` that each head mixes; None where one's are not there."""
        if mixed.shape[1] % self.heads:
            return None
        targets = self.split_sequences(mixed).unflatten(-1, (self.heads, -1))  # [B, T, H, dh]
        width, starts = targets.shape[-1], []
        for head in range(self.heads):
            found, target = alpha[:, head] @ self.split_sequences(values), targets[:, :, head]
            limit = _MIXED[self.dtype] * target[..., 0].norm()
            near = (found - target[..., :1]).flatten(0, 1).norm(dim=0) <= limit
            runs = (
                start
                for start in near.nonzero()[:, 0].tolist()
                if self.measure_error(found[..., start : start + width], target) <= _MIXED[self.dtype]
            )
            start = next(runs, None)
            if start is None:
                return None
            starts.append(start)
        return starts

    def describe_value(self, value: Call, starts: list[int], width: int) -> dict[str, Part]:
        """Returns the key/value heads, and the value projection as a module or columns of one."""
        first = list(dict.fromkeys(starts))  # of each key/value head
        if self.heads % len(first) or starts != [start for start in first for _ in range(self.heads // len(first))]:
            raise Undetected(f"query heads read the columns {starts} of {value.path!r}, which are not groups of heads")
        together = next((n for n, start in enumerate(first) if start != first[0] + n * width), len(first))
        groups, columns = len(first) // together, value.output.shape[1]
        stride = columns // groups
        expected = [first[0] + group * stride + n * width for group in range(groups) for n in range(together)]
        if first != expected or first[0] + together * width > stride or columns % groups:
            raise Undetected(f"the columns {first} of {value.path!r}, where its values begin, are in no regular order")
        cut = Cut(value.path, first[0], first[0] + together * width, groups)
        whole = together * width == stride
        return {"kv_heads": len(first), "value": value.path if whole else cut}

    def find_ff_blocks(self, out: Call) -> Iterator[tuple[tuple[int, float], Call, Call, dict[str, Part]]]:
        """Yields pairs of projections with an activation between: how good (less is better), up, down, the parts."""
        for down in self.linears:
            if down is out:
                continue
            sources = [(call, *part) for call in self.linears if call is not down for part in _split_output(call, down)]
            for call, part, z in sources:
                for rank, activation, value in self.apply_activations(z):
                    error = self.measure_error(value, down.input)
                    found: dict[str, Part] = {"down": down.path, "activation": activation}
                    if error <= _EQUAL[self.dtype]:
                        yield (rank, error), call, down, {"up": part, "gate": None, **found}
                    for other, up, factor in sources:
                        error = self.measure_error(value * factor, down.input)
                        if up != part and error <= _EQUAL[self.dtype] and self.are_equal(other.input, call.input):
                            yield (rank, error), call, down, {"up": up, "gate": part, **found}

    def apply_activations(self, z: Tensor) -> Iterator[tuple[int, Part, Tensor]]:
        """Yields what may have been made of ``z``, surest first: by a module that read it, an attribute, a function."""
        for call in self.calls:
            read_it = call not in self.linears and call not in self.norms and self.are_equal(call.input, z)
            if read_it and call.output.shape == z.shape and not self.are_equal(call.output, z):
                yield 0, call.path, call.output
        for path, module in self.layer.named_modules():
            for name, function in vars(module).items():
                if "act" in name and callable(function):
                    try:
                        value = function(z.clone())
                    except Exception:  # whatever else is called so
                        continue
                    if isinstance(value, Tensor) and value.shape == z.shape:
                        yield 1, f"{path}.{name}" if path else name, value
        yield from ((2, activation, activation.value(z)) for activation in ACTIVATIONS.values())

    def apply_scales(self, path: str, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Yields what a projection returned as it is, and times every parameter of the layer that has its width."""
        yield path, tensor
        for name, parameter in self.layer.named_parameters():
            if parameter.shape == tensor.shape[1:] and not name.endswith("bias"):
                yield Product(path, name), tensor * parameter.detach().to("cpu", self.wide)

    def match_streams(
        self, projections: tuple[str, str], attended: Tensor, ff_input: Tensor, ff: Tensor
    ) -> Iterator[dict[str, Part]]:
        """Yields the norms, the scales and whether blocks are parallel that make the output of what both return."""
        out, down = projections
        for (scaled_out, a), parallel in product(self.apply_scales(out, attended), (False, True)):
            for norm_of_attn, added in self.apply_norms(a):
                for norm_after_attn, stream in self.apply_norms(self.x + added):
                    source = self.x if parallel else stream
                    before = [name for name, t in self.apply_norms(source) if self.are_equal(t, ff_input)]
                    for norm_before_ff, (scaled_down, f) in product(before, self.apply_scales(down, ff)):
                        for norm_of_ff, returned in self.apply_norms(f):
                            for norm_after_ff, result in self.apply_norms(stream + returned):
                                if self.are_equal(result, self.y):
                                    yield {
                                        "out": scaled_out,
                                        "down": scaled_down,
                                        "norm_of_attn": norm_of_attn,
                                        "norm_after_attn": norm_after_attn,
                                        "norm_before_ff": norm_before_ff,
                                        "norm_of_ff": norm_of_ff,
                                        "norm_after_ff": norm_after_ff,
                                        "parallel": parallel,
                                    }


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__


def _is_linear(module: nn.Module) -> bool:
    """Accepts subclasses too, so that it is said of them that they cannot be read."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or "Linear" in type(module).__name__


def _split_output(call: Call, down: Call) -> Iterator[tuple[str | Cut, Tensor]]:
    """Yields what ``down`` may read an activation of: the whole output, either half, every other column."""
    width, columns = down.input.shape[1], call.output.shape[1]
    if columns == width:
        yield call.path, call.output
    elif columns == 2 * width:
        for half in (0, 1):
            yield Cut(call.path, half * width, (half + 1) * width), call.output[:, half * width : (half + 1) * width]
            yield Cut(call.path, half, half + 1, width), call.output[:, half::2]
