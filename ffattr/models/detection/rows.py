"""What happened in one run of a layer, as rows of tokens that are compared: its projections, its norms, and the rest.

All tensors are ``[rows, width]``, one row per token, on the CPU in float32 or wider.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from ...decomposition.activations import ACTIVATIONS, make_swish
from ...decomposition.attention import Attention
from ..spec.norms import is_norm
from .parts import Gain, Part, Product
from .probe import Undetected
from .watch import Call, Run

__all__ = ["EQUAL", "MIXED", "LayerRows", "is_batch_first", "is_linear"]

# Relative differences of two tensors that rounding explains: of a sum, an activation or a product, and of attention,
# whose weights may have been made in float32 whatever the model's dtype.
EQUAL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
MIXED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_FACTORS = ("scale", "scaling", "multiplier", "factor")  # of what the attributes of numbers are called


class LayerRows:
    """The calls of one run, with its input ``x`` and output ``y``, and its attention weights, ``[B, H, T, T]``."""

    def __init__(self, run: Run) -> None:
        assert run.output is not None
        self.layer = run.layer
        self.device, self.dtype = run.input.device, run.input.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.caller, self.attention = run.attention[0]
        self.cross = run.attention[1] if len(run.attention) > 1 else None
        self.batch, self.heads, self.length, keys = self.attention.shape
        if self.length != keys or self.dtype not in EQUAL:
            raise Undetected(
                f"attention has {self.length} queries and {keys} keys, hidden states are {self.dtype}; expected as "
                "many keys as queries and a float type"
            )
        self.batch_first = is_batch_first(run)
        self.alpha = self.read_alpha(self.attention)
        whole = self.alpha.isfinite().all(-1).all(1)  # [B, T]: a row of padding may have no key to attend to
        self.alpha = self.alpha.nan_to_num()
        self.kept = whole if self.batch_first else whole.T
        self.whole = whole
        self.x, self.y = self.flatten_rows(run.input), self.flatten_rows(run.output)
        times = Counter(call.path for call in run.calls)
        calls = [
            Call(call.path, call.module, self.flatten_rows(call.input), self.flatten_rows(call.output), call.others)
            for call in run.calls
            if times[call.path] == 1 and call.input.dim() and call.output.dim()
        ]
        of_tokens = [call for call in calls if len(call.input) == len(call.output) == len(self.x)]
        # What acts on the heads of every token, one by one.
        self.by_head = [
            call
            for call in calls
            if len(call.output) > len(self.x) and len(call.output) % len(self.x) == 0 and call.input.dim() == 2
        ]
        order = {path: place for place, (path, _) in enumerate(run.layer.named_modules())}
        self.calls = sorted(of_tokens, key=lambda call: order[call.path])  # a wrapper before what it wraps
        self.linears = [call for call in self.calls if is_linear(call.module)]
        self.norms = [call for call in self.calls if self.is_norm(call)]
        rows = 0 if self.cross is None else self.batch * self.cross[1].shape[3]
        self.of_encoder = [call for call in calls if is_linear(call.module) and len(call.input) == rows]

    def flatten_rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", self.wide)

    def split_sequences(self, rows: Tensor) -> Tensor:
        """Returns rows ``[B * T, width]`` as ``[B, T, width]``, whichever of the two comes first in the model; those of
        an encoder's tokens, too."""
        length = len(rows) // self.batch
        if self.batch_first:
            return rows.view(self.batch, length, -1)
        return rows.view(length, self.batch, -1).transpose(0, 1)

    def is_norm(self, call: Call) -> bool:
        """Tells a norm by its name or, where the module has none inside it, by what it computes."""
        if isinstance(call.module, nn.LayerNorm) or "Norm" in type(call.module).__name__:
            return True
        if call in self.linears or call.input.shape != call.output.shape or any(True for _ in call.module.children()):
            return False
        if self.measure_error(call.input, call.output) < 1e-3:
            return False
        return all(one.dim() == 1 for one in call.module.parameters()) and is_norm(call.module, call.input.shape[1])

    def measure_error(self, found: Tensor, expected: Tensor) -> float:
        if found.shape != expected.shape:
            return float("inf")
        if len(found) == self.kept.numel():
            found, expected = found[self.kept.flatten()], expected[self.kept.flatten()]
        return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(self.wide).tiny))

    def are_equal(self, found: Tensor, expected: Tensor) -> bool:
        return self.measure_error(found, expected) <= EQUAL[self.dtype]

    def apply_norms(self, tensor: Tensor) -> Iterator[tuple[str | None, Tensor]]:
        """Yields the tensor as it is, and what each norm that reads it makes of it."""
        yield None, tensor
        yield from ((call.path, call.output) for call in self.norms if self.are_equal(call.input, tensor))

    @cached_property
    def gains(self) -> list[tuple[str, Tensor]]:
        """The layer's own parameters and buffers by which its whole output may be multiplied, by name."""
        own = (*self.layer.named_parameters(recurse=False), *self.layer.named_buffers(recurse=False))
        sizes = (1, self.x.shape[1])
        kept = ((name, one.detach().flatten()) for name, one in own if one.is_floating_point() and one.numel() in sizes)
        return [(name, one.to("cpu", self.wide)) for name, one in kept]

    def apply_last(self, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Yields what the last step of the layer may make of the tensor: a gain, a norm that reads it, nothing."""
        yield from ((Gain(name), tensor * gain) for name, gain in self.gains)
        yield from self.apply_norms(tensor)

    @cached_property
    def numbers(self) -> list[tuple[str, float]]:
        """The numbers among the attributes of the layer's modules by which something may be multiplied, by path."""
        found: dict[float, str] = {}
        for path, module in self.layer.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, float) and any(word in name for word in _FACTORS) and value not in (0.0, 1.0):
                    found.setdefault(value, f"{path}.{name}" if path else name)
        return [(path, value) for value, path in found.items()]

    def read_alpha(self, attention: Attention) -> Tensor:
        """Returns attention weights ``[B, H, T, T]``, of cross-attention ``[B, H, T, T']``."""
        tokens = torch.arange(self.length, device=self.device)
        keys = torch.arange(attention.shape[3], device=self.device)
        sequences = (attention.sequence(batch, tokens, self.wide, keys) for batch in range(self.batch))
        return torch.stack([sequence.attention_weights(tokens) for sequence in sequences]).cpu()

    def find_value_starts(self, alpha: Tensor, values: Tensor, mixed: Tensor) -> list[int] | None:
        """Returns the first of the columns of ``values`` that each head mixes; None where one's are not there."""
        heads = alpha.shape[1]
        if mixed.shape[1] % heads:
            return None
        targets = self.split_sequences(mixed).unflatten(-1, (heads, -1))  # [B, T, H, dh]
        width, starts = targets.shape[-1], []
        for head in range(heads):
            found, target = alpha[:, head] @ self.split_sequences(values), targets[:, :, head]
            limit = MIXED[self.dtype] * target[self.whole][..., 0].norm()
            found, target = found[self.whole], target[self.whole]
            near = (found - target[..., :1]).norm(dim=0) <= limit
            runs = (
                start
                for start in near.nonzero()[:, 0].tolist()
                if self.measure_error(found[..., start : start + width], target) <= MIXED[self.dtype]
            )
            start = next(runs, None)
            if start is None:
                return None
            starts.append(start)
        return starts

    def find_bias(self, value: Call, starts: list[int], width: int) -> str | None:
        """Returns the path of a bias that columns of ``value`` have, ``width`` of them at each of ``starts``, but not
        the module that they are a product with: a parameter of the layer that is added beside it."""
        weight = getattr(value.module, "weight", None)
        if getattr(value.module, "bias", None) is not None or not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        columns = [start + feature for start in starts for feature in range(width)]
        if weight.shape != (value.output.shape[1], value.input.shape[1]):
            return None
        added = (value.output - value.input @ weight.detach().to("cpu", self.wide).T)[:, columns].mean(0)
        rounding = EQUAL[self.dtype] * float(value.output[:, columns].square().mean(0).sum().sqrt())
        if float(added.norm()) <= rounding:
            return None
        for name, one in self.layer.named_parameters():
            if one.shape == added.shape and float((added - one.detach().to("cpu", self.wide)).norm()) <= rounding:
                return name
        return None

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

    def fit_swish(self, z: Tensor, found: Tensor) -> Iterator[tuple[int, Part, Tensor]]:
        """Yields ``z sigmoid(alpha z)``, with the ``alpha`` by which it is nearest to ``found``, as the least sure.

        It is the one with a parameter that is written out in forward passes; all others have to be seen as a whole.
        """
        share = found / z
        alphas = (share / (1 - share)).log() / z
        kept = alphas[(z.abs() > 0.1) & (share > 0.01) & (share < 0.99) & alphas.isfinite()]
        if len(kept):
            alpha = float(kept.median())
            round_alpha = float(f"{alpha:.4g}")  # as people write it
            close = abs(alpha - round_alpha) <= EQUAL[self.dtype] * abs(alpha)
            swish = make_swish(round_alpha if close else alpha)
            yield 3, swish, swish.value(z)

    def apply_scales(self, path: str, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Yields what a projection returned as it is, and times every parameter of the layer that has its width."""
        yield path, tensor
        for name, parameter in self.layer.named_parameters():
            if parameter.shape == tensor.shape[1:] and not name.endswith("bias"):
                yield Product(path, name), tensor * parameter.detach().to("cpu", self.wide)
        for name, number in self.numbers:
            yield Product(path, name, is_number=True), tensor * number


def is_batch_first(run: Run) -> bool:
    """Tells whether a layer takes ``[B, T, d]``, and not ``[T, B, d]``, by the attention weights in it."""
    batch, _, length, _ = run.attention[0][1].shape
    return tuple(run.input.shape[:2]) == (batch, length)


def is_linear(module: nn.Module) -> bool:
    """Accepts subclasses too, so that it is said of them that they cannot be read."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or "Linear" in type(module).__name__
