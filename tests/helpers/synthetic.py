"""Made-up `Attribution` objects: what the views and analyses need of one, without a model."""

import torch

from ffattr.results import Attribution
from ffattr.results.kept.dense import DenseMaps

POST_LN = ("attn_heads", "attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln")
PRE_LN = ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res")
HEADS = 2


def attribution(scopes=POST_LN, layers=(0, 2, 5), tokens=6, real=(6, 4), queries=None, causal=False, seed=0):
    """Random maps ``[layers, len(real), queries, tokens]``; sequence ``b`` has ``real[b]`` tokens, then padding."""
    generator = torch.Generator().manual_seed(seed)
    queries = tuple(range(tokens)) if queries is None else queries
    mask = torch.arange(tokens) < torch.tensor(real)[:, None]
    rows = torch.tensor(queries, dtype=torch.int64)
    pairs = mask[:, rows, None] & mask[:, None, :]
    if causal:
        pairs = pairs & (torch.arange(tokens) <= rows[:, None])
    maps, bias = {}, {}
    for scope in scopes:
        heads = (HEADS,) if scope == "attn_heads" else ()
        shape = (len(layers), len(real), *heads, len(queries), tokens)
        maps[scope] = torch.rand(shape, generator=generator) * (pairs[:, None] if heads else pairs)
        bias[scope] = torch.rand((len(layers), len(real), len(queries)), generator=generator)
    return Attribution(
        kept=DenseMaps(maps),
        bias=bias,
        tokens=[[f"tok{b}.{t}" for t in range(tokens)] for b in range(len(real))],
        layers=tuple(layers),
        queries=queries,
        scopes=tuple(scopes),
        mask=mask,
        error=torch.rand((len(layers), len(real)), generator=generator),
        plan="a plan",
        arguments={"ig": "exact", "dtype": torch.float32, "causal": causal},
    )
