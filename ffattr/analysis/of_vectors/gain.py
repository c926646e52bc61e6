"""Whether a norm's gain scales down what the feed-forward network writes most to.

Shapes: ``L`` layers, ``d`` model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ...errors import names_missing_extra
from ..ranks import spearman
from ..rows import Decomposed
from .cancellation import ff_energy

if TYPE_CHECKING:
    import pandas

__all__ = ["gain_balance"]


@names_missing_extra
def gain_balance(vectors: Mapping[str, Decomposed] | Sequence[Decomposed], gains: Tensor) -> pandas.DataFrame:
    """Sets the gain of each dimension beside how much the feed-forward network writes to it.

    One row per layer and dimension: ``layer``, ``dimension``, ``gain`` (its absolute value), ``ff`` (the root of the
    mean square of what the network adds, `ff_energy`) and ``rho``, Spearman's rank correlation of the two over the
    dimensions of the layer: below zero where the gain is small in dimensions that the network writes much to.

    ``gains`` are ``[L, d]``, or ``[d]`` for all layers: those of the norm behind the network, or in a pre-LN layer of
    the one before it. ``vectors`` as for `ff_energy`. Raises ValueError for gains of another shape.

    >>> vectors = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scope="atb_ff")
    >>> gains = torch.stack([layer.output.LayerNorm.weight for layer in model.encoder.layer])
    >>> found = ffattr.analysis.gain_balance([vectors], gains)
    >>> found.groupby("layer").size().tolist()
    [40, 40, 40]
    """
    import pandas as pd

    written = ff_energy(vectors).sqrt().cpu()
    one = next(iter(vectors.values() if isinstance(vectors, Mapping) else vectors))
    if gains.shape not in (written.shape, written.shape[1:]):
        raise ValueError(f"gains have shape {list(gains.shape)}, expected {list(written.shape)} (layers, dimensions)")
    sizes = gains.detach().abs().double().cpu().expand(written.shape)
    frames = [
        pd.DataFrame({"layer": layer, "dimension": range(len(gain)), "gain": gain.numpy(), "ff": ff.numpy()}).assign(
            rho=spearman(gain, ff)
        )
        for layer, gain, ff in zip(one.layers, sizes, written, strict=True)
    ]
    return pd.concat(frames, ignore_index=True)
