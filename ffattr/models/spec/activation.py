"""Activation functions, recognised by their values.

Those that are known have closed forms (`ffattr.decomposition.activations`); any other gets a derivative by autograd.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...decomposition.activations import ACTIVATIONS, FALLBACK_NODES, Activation
from ...decomposition.closed_forms import Function

__all__ = ["identify_activation"]

_recognised: WeakKeyDictionary[Callable[[Tensor], Tensor], tuple[Tensor, Activation]] = WeakKeyDictionary()
"""Functions that were found to be element-wise, with their values on the grid and the known activation they compute."""


def identify_activation(fn: Callable[[Tensor], Tensor] | Activation) -> Activation:
    """Returns the `Activation` that a function computes, recognised by its values, not by its name or class.

    ``fn`` is evaluated on a float32 grid (on its parameters' device if it has any) and must agree with a known
    activation to 1e-6; erf- and tanh-GELU differ by 4.7e-4. An unknown function gets a derivative by autograd and no
    closed forms, with a warning. Raises ValueError if ``fn`` is not an element-wise, deterministic function.
    A function that was recognised before, and has the very same values again, is not looked at any further.
    """
    if isinstance(fn, Activation):
        return fn
    name = fn.__class__.__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", repr(fn))
    parameter = next(fn.parameters(), None) if isinstance(fn, nn.Module) else None
    device = None if parameter is None else parameter.device

    # Past hooks of the user, which may be meant for one call of the model, or for one shape.
    compute = fn.forward if isinstance(fn, nn.Module) and (fn._forward_hooks or fn._forward_pre_hooks) else fn

    def apply_fn(x: Tensor) -> Tensor:
        return compute(x) if parameter is None else compute(x.to(parameter.dtype)).to(x.dtype)

    x = _make_grid(device)
    with torch.no_grad():
        y = _evaluate_probe(apply_fn, x, name)
        known = _recall(fn, y)
        if known is not None:
            return known
        _check_elementwise(apply_fn, x, y, name)
        scale = y.abs().clamp_min(1)
        for activation in ACTIVATIONS.values():
            if ((activation.value(x) - y).abs() <= 1e-6 * scale).all():
                _remember(fn, y, activation)
                return activation
    warnings.warn(
        f"ffattr has no closed form for the activation {name!r}: Integrated Gradients falls back to Gauss-Legendre "
        f"quadrature with {FALLBACK_NODES} nodes and derivatives by autograd, which is slower and not exact at kinks. "
        f"Known activations: {', '.join(ACTIVATIONS)}.",
        stacklevel=2,
    )

    def differentiate_fn(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():  # the caller has usually switched gradients off
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(apply_fn(x).sum(), x)[0]

    return Activation(name, lambda x: apply_fn(x.detach()).detach(), differentiate_fn)


@functools.lru_cache(maxsize=4)
def _make_grid(device: torch.device | None) -> Tensor:
    with torch.inference_mode(False):  # for all later calls
        given: Any = {"dtype": torch.float32, "device": device}  # whatever torch's default dtype is
        far = torch.logspace(1, 4, 16, **given)  # a clipped GELU is no GELU
        return torch.cat([-far, torch.linspace(-10, 10, 479, **given), far, far.new_zeros(1)]).view(16, 32)


def _recall(fn: Callable[[Tensor], Tensor], y: Tensor) -> Activation | None:
    """Returns what ``fn`` was recognised as, if its values on the grid are still ``y``."""
    try:
        values, activation = _recognised[fn]
    except (KeyError, TypeError):  # a callable object need not have a hash, nor take a weak reference
        return None
    return activation if values.device == y.device and torch.equal(values, y) else None


def _remember(fn: Callable[[Tensor], Tensor], y: Tensor, activation: Activation) -> None:
    try:
        _recognised[fn] = y, activation
    except TypeError:
        return


def _evaluate_probe(value: Function, x: Tensor, name: str) -> Tensor:
    try:
        y = value(x.clone())  # fn may work in place
    except Exception as error:
        raise ValueError(
            f"the activation {name!r} cannot be applied to a tensor {list(x.shape)}: {error}. ffattr needs an "
            "element-wise function of one tensor."
        ) from error
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"the activation {name!r} is not element-wise: it maps shape {list(x.shape)} to {got}. A gated block's "
            "activation is the function on the gate alone (for instance SiLU, not SwiGLU)."
        )
    return y


def _check_elementwise(value: Function, x: Tensor, y: Tensor, name: str) -> None:
    kept = torch.arange(x.numel(), device=x.device).view_as(x) % 3 == 0
    changed = _evaluate_probe(value, torch.where(kept, x, 1.5 - x), name)  # other points differ
    moved = _evaluate_probe(value, x.flip(0, 1), name).flip(0, 1)  # same points, other places
    tolerance = 1e-5 * y.abs().clamp_min(1)
    close = ((moved - y).abs() <= tolerance) & (((changed - y).abs() <= tolerance) | ~kept)
    wrong = ~close & ~y.isnan()
    if wrong.any():
        raise ValueError(
            f"the activation {name!r} is not an element-wise, deterministic function: its value at "
            f"{x[wrong][0].item():.4g} depends on the other points, on the place, or on chance."
        )
