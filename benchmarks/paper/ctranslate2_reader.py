"""CTranslate2's model files (``model.bin``), and the weights of Whisper out of one.

The format, little-endian: version, name and revision of the specification, the variables (name, rank, sizes, type,
bytes), the aliases; a string has its length before it and a zero after it. Source: ``model_spec.py`` of CTranslate2.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["File", "read", "whisper_state"]

_VERSION = 6
_TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)


class File(NamedTuple):
    """``variables`` by name, aliases included."""

    specification: str
    revision: int
    variables: dict[str, Tensor]


def read(path: Path) -> File:
    """Everything in the file, in the types it is kept in. Raises ValueError for a version or a type not known here."""
    data = _Bytes(path)
    (version,) = data.take("I")
    if version != _VERSION:
        raise ValueError(f"{path.name} is of version {version} of CTranslate2's format, expected {_VERSION}")
    specification, (revision,) = data.text(), data.take("I")
    variables = {}
    for _ in range(*data.take("I")):
        name, (rank,) = data.text(), data.take("B")
        shape = data.take(f"{rank}I")
        kind, size = data.take("BI")
        if kind >= len(_TYPES) or math.prod(shape) * _TYPES[kind].itemsize != size:
            raise ValueError(f"{path.name}: {name} is of type {kind} and shape {shape} in {size} bytes")
        variables[name] = data.tensor(_TYPES[kind], shape, size)
    for _ in range(*data.take("I")):
        alias, name = data.text(), data.text()
        variables[alias] = variables[name]
    if data.left:
        raise ValueError(f"{path.name} goes on for {data.left} bytes after its aliases")
    return File(specification, revision, variables)


class _Bytes:
    def __init__(self, path: Path) -> None:
        self._data = bytearray(path.read_bytes())  # not bytes: torch takes them for tensors that may not be written
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, layout: str) -> tuple[int, ...]:
        values: tuple[int, ...] = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        (size,) = self.take("H")
        self._at += size
        return self._data[self._at - size : self._at - 1].decode()

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> Tensor:
        # A copy: in the file, tensors begin at odd addresses.
        values = torch.frombuffer(self._data[self._at : self._at + size], dtype=dtype).view(shape)
        self._at += size
        return values


# Parts of a layer: which modules share each matrix, one below the other.
_LAYER = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
_OUTSIDE = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
_ENDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
# What makes a CTranslate2 model the Whisper that transformers has.
_SETTINGS = {
    "decoder/activation": 3,  # GELU by the error function
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
_ELSEWHERE = ("num_heads", "alignment_heads", "alignment_layer")  # in the configuration, or of no weight


def whisper_state(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of transformers' ``WhisperModel``, float32, out of CTranslate2's ``variables``.

    Each variable is used or known to hold no weight. Raises ValueError for one that is neither.
    """
    state: dict[str, Tensor] = {}
    for variable, value in variables.items():
        if variable in _SETTINGS:
            if int(value) != _SETTINGS[variable]:
                raise ValueError(f"{variable} is {int(value)}, expected {_SETTINGS[variable]}")
            continue
        stack, _, rest = variable.partition("/")
        if rest in _ELSEWHERE or variable == "decoder/projection/weight":  # the embedding once more
            continue
        where, _, end = rest.rpartition("/")
        end = _ENDS.get(end, end)
        if where.startswith("layer_") and "/" in where:
            layer, part = where.split("/", 1)
            if part not in _LAYER:
                raise ValueError(f"{variable} is no part of Whisper, expected one of {', '.join(_LAYER)}")
            targets = [f"{stack}.layers.{layer.removeprefix('layer_')}.{module}" for module in _LAYER[part]]
        else:
            targets = [f"{stack}.{_OUTSIDE.get(where, where)}"]
        for target, rows in zip(targets, value.float().chunk(len(targets)), strict=True):
            state[f"{target}.{end}"] = rows
    for name in [name for name in state if name.endswith("k_proj.bias")]:
        if state.pop(name).any():
            raise ValueError(f"{name} is not zero, but Whisper's keys have no bias")
    return state
