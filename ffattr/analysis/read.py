"""What analyses read: maps that were kept, or blocks of rows as they are computed.

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Block", "Maps", "counted"]


class Maps(Protocol):
    """What analyses read of an `ffattr.Attribution`."""

    @property
    def maps(self) -> Mapping[str, Tensor]: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def queries(self) -> Sequence[int]: ...
    @property
    def scopes(self) -> Sequence[str]: ...
    @property
    def mask(self) -> Tensor: ...
    @property
    def key_mask(self) -> Tensor | None: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


class Block(Protocol):
    """What analyses of a stream read of an `ffattr.Rows`."""

    @property
    def layer(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def queries(self) -> Tensor: ...
    @property
    def keys(self) -> Tensor: ...
    @property
    def maps(self) -> Mapping[str, Tensor]: ...


def counted(attribution: Maps) -> list[Tensor]:
    """Per sequence ``[N, T]``: True at the pairs that count."""
    mask = attribution.mask
    keys = mask if attribution.key_mask is None else attribution.key_mask
    queries = torch.tensor(list(attribution.queries), dtype=torch.long, device=mask.device)
    allowed = torch.ones(len(queries), keys.shape[1], dtype=torch.bool, device=mask.device)
    if attribution.arguments.get("causal"):
        allowed = torch.arange(keys.shape[1], device=mask.device) <= queries[:, None]
    return [row[queries][:, None] & key[None, :] & allowed for row, key in zip(mask, keys, strict=True)]
