"""The maps that GlobEnc multiplies: of the attention block, behind the layer's last norm, without feed-forward vectors.

Modarressi et al. 2022 (arXiv 2205.03286), as their code computes it. Shapes: ``L`` layers, ``B`` sequences, ``N`` query
tokens, ``T`` tokens, ``d`` model width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..rows import Decomposed, join_residual, read_summed_values

__all__ = ["globenc_maps"]


def globenc_maps(vectors: Mapping[str, Decomposed], gains: Tensor, epsilon: float = 1e-12) -> Tensor:
    """Returns norms ``[L, B, N, T]`` of the attention block's vectors, centred, divided by the scale that the last norm
    of a post-LN layer had on its true input, and multiplied by its gain.

    The feed-forward network counts for that scale alone. `rollout_maps` with ``normalise=False`` and ``residual=0``
    multiplies such maps through the layers, as GlobEnc does.

    vectors: those of the scopes ``atb`` and ``atb_ff_res``. gains: of the layers' last norms, ``[L, d]``; ``epsilon``:
    what they add to the variance. Raises ValueError for vectors of other layers than post-LN ones, and for gains of
    another shape.

    >>> vectors = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scope=["atb", "atb_ff_res"])
    >>> gains = torch.stack([layer.output.LayerNorm.weight for layer in model.encoder.layer])
    >>> maps = ffattr.analysis.globenc_maps(vectors, gains, model.config.layer_norm_eps)
    >>> ffattr.analysis.rollout_maps(maps, residual=0, normalise=False).shape
    torch.Size([3, 1, 6, 6])
    """
    last = join_residual("atb_ff")
    if not {"atb", last} <= set(vectors):
        raise ValueError(f"vectors of {', '.join(vectors) or 'nothing'}: expected those of atb and {last}, of a BERT")
    values, total = read_summed_values(vectors["atb"]), vectors[last].total
    if gains.shape != (values.shape[0], values.shape[-1]):
        raise ValueError(f"gains have shape {list(gains.shape)}, expected {[values.shape[0], values.shape[-1]]}")
    variance = total.var(-1, unbiased=False)[..., None, None]
    centred = values - values.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(variance + epsilon) * gains.detach().to(values)[:, None, None, None]
    norms: Tensor = scaled.norm(dim=-1)
    return norms
