"""Weights of transformers' models out of ONNX files; needs the package onnx, but nothing to run such a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["dinov2_state"]

_POSITIONS = ("/{}/embeddings/Concat_6", "/{}/embeddings/Reshape_1")  # of the class token, of the patches
_RENAMED = {  # in transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def dinov2_state(path: Path, root: str) -> dict[str, Tensor]:
    """The state of ``Dinov2Model`` out of a model whose backbone PyTorch exported under the name ``root``.

    Exporting leaves most parameters under their names. The weights of linear layers lose theirs, and are transposed;
    the table of positions is split in two. Both are found by the name of the node that reads them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    readers = {node.name: [weights[name] for name in node.input if name in weights] for node in graph.node}
    state = {name.removeprefix(f"{root}."): value for name, value in weights.items() if name.startswith(f"{root}.")}
    for node, read in readers.items():
        if node.startswith(f"/{root}/") and node.endswith("/MatMul") and read:
            (weight,) = read
            module = node.removeprefix(f"/{root}/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = weight.T.contiguous()
    positions = [table for node in _POSITIONS for table in readers[node.format(root)]]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for before, after in _RENAMED.items():
        name = name.replace(before, after)
    return name
