"""Made-up attributions handed to a sink in blocks of query tokens, as the engine does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from synthetic import attribution
from torch import Tensor

from ffattr.results import Attribution
from ffattr.results.kept.policy import Kept, Sink
from ffattr.results.serialise import to_parts

SCOPES = ("attn_heads", "atb", "atb_ff")
CUTS = [{"cut": 1}, {"cut": 4}, {"cut": 9, "backwards": True}, {"cut": 2, "backwards": True}]
"""Ways to cut rows into blocks, for `kept`."""


def some(scopes=SCOPES, tokens=7, real=((0, 1, 3, 4, 5, 6), (2, 3, 4)), dtype=torch.float64, **options: Any):
    """Maps of sequences whose real tokens are ``real``, with padding before, after and between them; some tie."""
    attr = attribution(scopes, tokens=tokens, real=(tokens,) * len(real), **options)
    attr.mask = torch.stack([torch.isin(torch.arange(tokens), torch.tensor(row)) for row in real])
    queries = torch.tensor(attr.queries, dtype=torch.int64)
    for scope in scopes:
        pairs = attr.mask[:, queries, None] & attr.mask[:, None]
        maps = (attr.maps[scope].to(dtype) * 8).floor() / 8
        attr.maps[scope] = maps * (pairs if maps.dim() == 4 else pairs[:, None])
    return attr


def feed(sink: Sink, attr: Attribution, cut: int = 3, backwards: bool = False, device: Any = None) -> Sink:
    """All rows of ``attr.maps``, ``cut`` at a time."""
    queries = torch.tensor(attr.queries, dtype=torch.int64)
    keys_of = attr.mask if attr.key_mask is None else attr.key_mask
    places = [(place, batch) for place in range(len(attr.layers)) for batch in range(len(attr.mask))]
    for place, batch in places[::-1] if backwards else places:
        rows, keys = attr.mask[batch][queries].nonzero()[:, 0], keys_of[batch].nonzero()[:, 0]
        blocks = list(rows.split(cut))
        for block in blocks[::-1] if backwards else blocks:
            tiles = {scope: maps[place, batch][..., block, :][..., keys] for scope, maps in attr.maps.items()}
            sink.add_rows(place, batch, block, keys, {scope: tile.to(device) for scope, tile in tiles.items()})
    return sink


def opened(keep: Any, attr: Attribution) -> Sink:
    shapes = {scope: tuple(maps.shape) for scope, maps in attr.maps.items()}
    dtype = next(iter(attr.maps.values())).dtype
    return keep.open(shapes, dtype, torch.device("cpu"), attr.layers, attr.queries)


def kept(keep: Any, attr: Attribution, **how: Any) -> Attribution:
    """What `ffattr.attribute` would return of these maps."""
    sink = feed(opened(keep, attr), attr, **how)
    return result_of(sink, attr, sink.finish())


def result_of(sink: Sink, attr: Attribution, found: Kept) -> Attribution:
    result = replace(attr, kept=found)
    sink.seal_file(*to_parts(result))
    return result


def row(tile: Tensor, keys: Tensor, k: int) -> tuple[list[float], list[int]]:
    """The k largest of a row by sorting pairs, and where they are."""
    pairs = sorted((-value, key) for value, key in zip(tile.tolist(), keys.tolist(), strict=True) if value > 0)[:k]
    missing = k - len(pairs)
    return [-value for value, _ in pairs] + [0.0] * missing, [key for _, key in pairs] + [-1] * missing


def rewrite_metadata(path: Path, **changes: str) -> None:
    """Changes the metadata of a safetensors file."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, **changes})
