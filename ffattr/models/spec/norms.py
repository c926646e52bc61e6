"""Norms: what a module computes is told by its numbers, not by what its class is called.

Conventions: ``d`` features; a norm is ``gain * (x - mean) / sqrt(variance + eps) + bias``, or that without the mean.
Written by hand, it may divide by ``sqrt(variance) + offset``, the variance being the mean over ``d - 1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...decomposition.affine import Norm
from ...errors import UnsupportedModel
from . import wrapped

__all__ = ["GainSpec", "is_norm", "read_norm"]

Kind = Literal["layer", "rms"]

_KINDS: tuple[Kind, ...] = ("layer", "rms")
_EPS = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")
# Relative difference that rounding explains, by the dtype of what a module is given; many compute in float32 inside.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_LARGE, _SMALL = 16.0, 1 / 64  # powers of two, at which eps is nearly nothing, and is much of what there is

_ROUNDS = 6
_ROUNDINGS = 64
"""Units of rounding within which a norm is the one that a module computes."""


@dataclass(frozen=True)
class GainSpec:
    """A parameter or buffer ``name`` of ``module``, one number or one for each feature, that multiplies the whole
    output of a layer as its last step (Gemma 4): a norm without statistics.

    >>> layer = torch.nn.Module()
    >>> layer.scalar = torch.nn.Parameter(torch.full((1,), 0.5))
    >>> ffattr.models.spec.norms.read_norm(ffattr.GainSpec(layer, "scalar"), None, 8).weight.shape
    torch.Size([8])
    """

    module: nn.Module
    name: str


def read_norm(module: nn.Module | GainSpec | None, dtype: torch.dtype | None, width: int | None = None) -> Norm | None:
    """Reads what a norm of ``width`` features computes, in ``dtype`` (None: as it is).

    ``width`` is needed where the module has no parameters. Raises `UnsupportedModel` for a module that computes neither
    a LayerNorm nor an RMSNorm.
    """
    if module is None:
        return None
    if isinstance(module, GainSpec):
        return _read_gain(module, dtype, width)
    module = wrapped.find_running(module)
    with wrapped.fetch_parameters(module):
        weight, bias = _read_parameter(module, "weight"), _read_parameter(module, "bias")
        if type(module) in (nn.LayerNorm, nn.RMSNorm):
            found = _read_torch_norm(module, weight, bias, dtype)
        else:
            found = _identify(module, weight, bias, width)

        def convert(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or dtype is None else tensor.to(dtype)

        return replace(found, weight=convert(found.weight), bias=convert(found.bias))


def _read_gain(part: GainSpec, dtype: torch.dtype | None, width: int | None) -> Norm:
    owner = wrapped.find_owner(part.module, part.name)
    with wrapped.fetch_parameters(owner):
        gain = wrapped.make_dense(getattr(owner, part.name).detach()).flatten()
        gain = gain if width is None else gain.expand(width)
        return Norm("gain", gain.clone() if dtype is None else gain.to(dtype).contiguous(), None, 0.0)


def is_norm(module: nn.Module, width: int) -> bool:
    """Tells whether a module computes a LayerNorm or an RMSNorm of ``width`` features."""
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return True
    try:
        read_norm(module, None, width)
    except UnsupportedModel:
        return False
    return True


def _read_torch_norm(module: Any, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None) -> Norm:
    eps = module.eps
    if eps is None:  # nn.RMSNorm's default
        eps = torch.finfo(dtype or torch.float32 if weight is None else weight.dtype).eps
    return Norm("rms" if type(module) is nn.RMSNorm else "layer", weight, bias, float(eps))


def _read_parameter(module: nn.Module, name: str) -> Tensor | None:
    found = getattr(module, name, None)
    return wrapped.make_dense(found) if isinstance(found, Tensor) and found.dim() == 1 else None


@torch.no_grad()
def _identify(module: nn.Module, weight: Tensor | None, bias: Tensor | None, width: int | None) -> Norm:
    """Finds what a module computes by what it makes of random rows: from the parameters that it has under their usual
    names, or else from its outputs alone."""
    ask = _Asked(module, weight, width)
    nearest, error = ask.choose_nearest(_list_candidates(module, weight, bias))
    if nearest is not None and error <= ask.tolerance:
        # One plus a weight is exact in a wider dtype; all else is as it was.
        own = weight if _is_same(nearest.weight, weight) else nearest.weight
        return replace(nearest, weight=own, bias=bias)
    measured = (ask.measure_norm(kind, of_root) for kind in _KINDS for of_root in (False, True))
    nearest, error = ask.choose_nearest(measured)
    if nearest is None or not error <= ask.tolerance:
        raise UnsupportedModel(
            f"a norm is a {ask.name} that computes neither a LayerNorm nor an RMSNorm: the nearest one is off by "
            f"{error:.1e} (relative), more than the {ask.tolerance:.0e} that rounding in {ask.dtype} explains"
        )
    return nearest


def _list_candidates(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> Iterator[Norm]:
    wide = None if weight is None else torch.promote_types(weight.dtype, torch.float32)
    gains = [None] if weight is None else [weight.to(wide), 1 + weight.to(wide)]  # Gemma's is one plus its weight
    shift = bias if bias is None or wide is None else bias.to(wide)
    for name in _EPS:
        eps = getattr(module, name, None)
        if isinstance(eps, float):
            yield from (Norm(kind, gain, shift, eps) for kind in _KINDS for gain in gains)
            yield from (Norm(kind, gain, shift, 0.0, eps) for kind in _KINDS for gain in gains)


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other.to(one.dtype))


class _Asked:
    """A module as it answers: random rows ``[n, d]``, large and small, and what it makes of them.

    It is given them as hidden states, ``[2, n / 2, d]``, so that what normalises over tokens does not pass for a norm.
    """

    def __init__(self, module: nn.Module, weight: Tensor | None, width: int | None) -> None:
        self.name = f"{type(module).__module__}.{type(module).__name__}"
        self.module = module
        size = width if weight is None else len(weight)
        if size is None:
            raise UnsupportedModel(f"a norm is a {self.name} without a weight, of which nobody says how wide it is")
        first = next((one for one in module.parameters() if one.is_floating_point()), None)
        dtype = torch.float32 if first is None else first.dtype
        self.device, self.dtype = torch.device("cpu") if first is None else first.device, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.tolerance = _TOLERANCE.get(dtype, 5e-2)
        self.rounding = min(self.tolerance, _ROUNDINGS * torch.finfo(dtype).eps)
        generator = torch.Generator().manual_seed(size)
        rows = torch.randn(4, size, generator=generator, dtype=torch.float32) + 0.5
        self.rows = rows.to(dtype).to(self.device)  # as the module gets them, rounded
        self.answers = [(self.rows * size, self.ask_module(self.rows * size)) for size in (1.0, _LARGE, _SMALL)]

    def ask_module(self, rows: Tensor) -> Tensor:
        """Returns what the module makes of rows, in a wide dtype and past any hooks."""
        try:
            found = type(self.module).forward(self.module, rows.unflatten(0, (2, -1)))
        except Exception as error:
            raise UnsupportedModel(
                f"a norm is a {self.name} that does not run on [2, 2, {rows.shape[-1]}]: {error}"
            ) from error
        if not isinstance(found, Tensor) or found.numel() != rows.numel() or found.shape[-1:] != rows.shape[-1:]:
            raise UnsupportedModel(f"a norm is a {self.name} that does not return a tensor of the shape it is given")
        return found.detach().flatten(0, -2).to(self.wide)

    def measure_error(self, norm: Norm) -> float:
        """Returns how far a norm is from the module, relative, on rows of every size."""
        errors = [
            float((norm(rows.to(self.wide)) - given).norm() / given.norm().clamp_min(1e-30))
            for rows, given in self.answers
        ]
        return max(errors) if all(error == error for error in errors) else float("inf")

    def choose_nearest(self, candidates: Iterable[Norm]) -> tuple[Norm | None, float]:
        """Returns the candidate that is nearest to the module, or the first that is so near that none could be nearer,
        and how far that is."""
        nearest: tuple[Norm | None, float] = (None, float("inf"))
        for candidate in candidates:
            error = self.measure_error(candidate)
            if error < nearest[1]:
                nearest = candidate, error
            if error <= self.rounding:
                break
        return nearest

    def measure_norm(self, kind: Kind, of_root: bool) -> Norm:
        """Returns the norm of a kind that fits best: its bias is what two opposite rows have in common, its gain what
        large rows are multiplied by, and its eps what small rows fall short by; ``of_root``: its offset.

        A variance over ``d - 1`` is one over ``d`` with another gain."""
        (large, of_large), (small, of_small) = self.answers[1:]
        bias = ((of_large + self.ask_module(-large)) / 2).mean(0)
        plain = fitted = Norm(kind, None, None, 0.0)
        size = 1 / plain.scale(small.to(self.wide))
        for _ in range(_ROUNDS):  # one is known the better, the better the other is
            normed = fitted(large.to(self.wide))
            gain = ((of_large - bias) * normed).sum(0) / normed.square().sum(0)
            expected = plain(small.to(self.wide)) * gain
            short = ((of_small - bias) * expected).sum(-1) / expected.square().sum(-1)
            found = float((size * (1 / short - 1) if of_root else size**2 * (short**-2 - 1)).mean())
            found = found if found > 0 else 0.0  # not a number neither
            fitted = replace(plain, offset=found) if of_root else replace(plain, eps=found)
        shifted = float(bias.norm()) > self.tolerance * float(gain.norm())
        return replace(fitted, weight=gain, bias=bias if shifted else None)
