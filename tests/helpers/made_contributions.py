"""Made-up `Contributions`, which add up, with padding and, if asked for, an encoder: what views need of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffattr.results.contributions import Contributions
from ffattr.results.kept.dense import DenseMaps

HOSTILE = '<img src=x onerror="window.flag=1">'


def contributions(
    targets: int = 2,
    layers: tuple[int, ...] = (0, 1, 2),
    tokens: int = 6,
    real: tuple[int, ...] = (6, 4),
    flow: bool | str = True,
    encoder: bool = False,
    seed: int = 0,
    **changed: Any,
) -> Contributions:
    """Scores of ``len(real)`` sequences, of which ``real[b]`` tokens stand at the right, behind padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(tokens) >= tokens - torch.tensor(real)[:, None]
    value = draw(targets, len(real))
    scores = draw(targets, len(layers) + 1, len(real), tokens) * mask
    total, more = scores.sum(-1), {}
    kept = _draw_flow(draw, flow, targets * len(layers), mask, mask)
    if encoder:
        within = contributions(targets, (0, 1), 5, tuple(5 - row for row in range(len(real))), flow, seed=seed + 1)
        across = draw(targets, len(layers) + 1, len(real), 5) * within.mask
        across[:, 0] = (
            across[:, 0] + ((within.value - across[:, 0].sum(-1)) / within.mask.sum(-1))[..., None] * within.mask
        )
        total = total + across.sum(-1)
        more = {"encoder": within, "cross_scores": across, "cross_mask": within.mask, "cross_tokens": within.tokens}
        more |= {"cross_kept": _draw_flow(draw, flow, targets * len(layers), mask, within.mask)}
    made = {
        "value": value,
        "scores": scores,
        "bias": value[:, None] - total,
        "error": torch.full((targets, len(real)), 1e-7, dtype=torch.float64),
        "targets": [[f" target {k}.{b}" for b in range(len(real))] for k in range(targets)],
        "positions": torch.full((targets, len(real)), tokens - 1),
        "tokens": [[f"tok{b}.{t}" for t in range(tokens)] for b in range(len(real))],
        "mask": mask,
        "layers": layers,
        "scope": "atb_ff" if kept is not None else None,
        "kept": kept,
        "residual": draw(targets, len(layers), len(real), tokens) * mask if kept is not None else None,
        "arguments": {"model": "made", "ig": "exact", "baseline": "zero", "ffattr": "0"},
    }
    return Contributions(**{**made, **more, **changed})


def _draw_flow(draw: Any, flow: bool | str, maps: int, rows: Tensor, columns: Tensor) -> DenseMaps | None:
    if not flow:
        return None
    pairs = rows[:, :, None] & columns[:, None]
    shape = (maps, len(rows), *((2,) if flow == "heads" else ()), rows.shape[1], columns.shape[1])
    return DenseMaps({"flow": draw(*shape) * (pairs[:, None] if flow == "heads" else pairs)})
