"""How much of a token's vector comes from the other tokens (Kobayashi et al. 2021, arXiv 2109.07152, section 4).

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens, ``d`` model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import names_missing_extra
from ..rows import Decomposed, read_names, read_summed_values

if TYPE_CHECKING:
    import pandas

__all__ = ["mixing_ratio"]


@names_missing_extra
def mixing_ratio(vectors: Decomposed) -> pandas.DataFrame:
    """Returns the context-mixing ratio of every token: ``context / (context + own)``, the bias left out.

    With ``F_i(x_j)`` the vector that token ``j`` brings to token ``i``, ``context`` is ``||sum of F_i(x_j), j != i||``
    and ``own`` is ``||F_i(x_i)||`` (Kobayashi et al. 2021: AttnResLn-N is the scope ``atb`` of BERT, AttnRes-N
    ``attn_res``, Attn-N ``attn``). One row per layer, sequence and real query token: ``layer``, ``batch``, ``query``,
    ``query_token``, ``context``, ``own``, ``ratio``.

    Rows depend on nothing but their own vectors. So a corpus goes a layer, a sequence or some queries at a time, and
    ``pandas.concat`` puts the frames together; ``frame["ratio"].mean()`` is then the number of the paper's Table 1,
    ``frame.groupby("layer")["ratio"].mean()`` its course through the layers.

        frames = [mixing_ratio(ffattr.vectors(model, inputs, scope="atb", layers=layer)) for layer in range(12)]

    In a decoder with cross-attention the encoder's tokens are not among the vectors and count for nothing. Raises
    ValueError for scopes told apart by head or expert, and for those whose keys are an encoder's tokens.

    >>> vectors = ffattr.vectors(model, ["The cat sat."], tokenizer=tokenizer, scope="atb", layers=0)
    >>> frame = ffattr.analysis.mixing_ratio(vectors)
    >>> list(frame["query_token"])
    ['[CLS]', 'The', 'cat', 'sat', '.', '[SEP]']
    >>> bool(frame["ratio"].between(0, 1).all())
    True
    """
    import pandas as pd

    values = read_summed_values(vectors)
    if vectors.key_mask is not None:
        raise ValueError(
            f"the keys of {vectors.scope} are the encoder's tokens, none of which is the query's own: "
            "the mixing ratio takes a scope without 'cross.'"
        )
    queries = torch.tensor(list(vectors.queries), dtype=torch.long, device=values.device)
    others = torch.arange(values.shape[-2], device=values.device) != queries[:, None]
    # Summed, not subtracted from the whole: a token without context then has none, and not the noise of rounding.
    context = torch.matmul(others.to(values.dtype)[:, None, :], values).squeeze(-2).norm(dim=-1)
    own = values[:, :, torch.arange(len(queries), device=values.device), queries].norm(dim=-1)
    ratio = context / (context + own)

    real = vectors.mask.to(values.device)[:, queries].expand(own.shape)
    layer, batch, row = (place.tolist() for place in real.nonzero(as_tuple=True))
    frame = pd.DataFrame({"layer": [vectors.layers[at] for at in layer], "batch": batch})
    frame["query"] = [vectors.queries[at] for at in row]
    names = read_names(vectors)
    frame["query_token"] = [names[b][q] for b, q in zip(batch, frame["query"], strict=True)]
    for name, tensor in (("context", context), ("own", own), ("ratio", ratio)):
        frame[name] = tensor[real].double().cpu().numpy()
    return frame
