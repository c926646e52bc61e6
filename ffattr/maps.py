"""`Attribution`: what `ffattr.attribute` returns, how it is saved, and the views of it.

Shapes: ``L`` computed layers, ``B`` sequences, ``N`` selected query tokens, ``T`` tokens, ``H`` heads.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import FfattrError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["FORMAT_VERSION", "Attribution", "FileFormatError", "load", "replacing"]

FORMAT_VERSION = 1
"""Version of the file layout of `Attribution.save`; raised when an older `load` could not read the file."""


class FileFormatError(FfattrError, ValueError):
    """A file is not one that `Attribution.save` wrote, is damaged, or is of a newer format."""


@dataclass(eq=False, repr=False)
class Attribution:
    """Maps of how much of each token reaches each token, per scope and layer.

    ``maps[scope]`` ``[L, B, N, T]`` (``attn_heads``: ``[L, B, H, N, T]``) is the norm of the part of query token
    ``queries[n]``'s vector that comes from key token ``t``; 0 where either is padding or masked.
    ``bias[scope]`` ``[L, B, N]`` is the norm of what comes from no token.

    ``tokens[b][t]`` is the text of a token (padding included), ``layers`` and ``queries`` say which of the model's
    layers and tokens the first and the last-but-one axis stand for, ``mask`` ``[B, T]`` is True at real tokens,
    ``error`` ``[L, B]`` is the relative difference between the recomputed and the model's own layer output. ``plan``
    prints as what ran, ``arguments`` holds how it was asked for.
    """

    maps: dict[str, Tensor]
    bias: dict[str, Tensor]
    tokens: list[list[str]]
    layers: tuple[int, ...]
    queries: tuple[int, ...]
    scopes: tuple[str, ...]
    mask: Tensor
    error: Tensor
    plan: object = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def scope(self, name: str) -> str:
        """The name of a computed scope: ``"layer"`` stands for the last one. Raises `KeyError` listing the others."""
        if name == "layer":
            return self.scopes[-1]
        if name not in self.maps:
            raise KeyError(f"no scope {name!r} here; computed: {', '.join(self.scopes)} (and the alias 'layer')")
        return name

    def __getitem__(self, scope: str) -> Tensor:
        """``attr["atb_ff"]``, or ``attr["layer"]`` for the last scope."""
        return self.maps[self.scope(scope)]

    def __repr__(self) -> str:
        sequences, tokens = self.mask.shape
        return (
            f"Attribution({len(self.layers)} layers, {sequences} x {tokens} tokens, {len(self.queries)} queries, "
            f"scopes: {', '.join(self.scopes)})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `load` (and any safetensors reader) reads.

        The file appears whole or not at all: it is written under another name beside ``path`` and then renamed.
        """
        tensors = {"mask": self.mask, "error": self.error}
        for scope in self.scopes:
            tensors[f"maps.{scope}"] = self.maps[scope]
            tensors[f"bias.{scope}"] = self.bias[scope]
        content = {
            "scopes": self.scopes,
            "layers": self.layers,
            "queries": self.queries,
            "tokens": self.tokens,
            "plan": None if self.plan is None else str(self.plan),
            "arguments": self.arguments,
        }
        metadata = {
            "format": "ffattr",
            "format_version": str(FORMAT_VERSION),
            "torch_version": str(torch.__version__),
            "attribution": json.dumps(content, default=str),
        }
        with replacing(path) as temporary:
            try:
                save_file(_storable(tensors), temporary, metadata=metadata)
            except safetensors.SafetensorError as error:  # what a full disk arrives as
                raise OSError(f"could not write {os.fspath(path)!r}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Reads a file that `save` wrote; tensors come back on the CPU, ``plan`` as a string.

        Raises `FileNotFoundError`, or `FileFormatError` that says whether the file is damaged, foreign or too new.
        """
        name = os.fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {name!r}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                _check_format(metadata, name)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError as error:
            raise FileFormatError(
                f"{name!r} is not a safetensors file, or is cut off or damaged ({error}); make it again with save()"
            ) from error
        try:
            content = json.loads(metadata["attribution"])
            scopes = tuple(content["scopes"])
            attribution = cls(
                maps={scope: tensors[f"maps.{scope}"] for scope in scopes},
                bias={scope: tensors[f"bias.{scope}"] for scope in scopes},
                tokens=[list(sequence) for sequence in content["tokens"]],
                layers=tuple(content["layers"]),
                queries=tuple(content["queries"]),
                scopes=scopes,
                mask=tensors["mask"],
                error=tensors["error"],
                plan=content["plan"],
                arguments=dict(content["arguments"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error
        attribution._check_shapes(name)
        return attribution

    def to_pandas(self, scopes: str | Sequence[str] | None = None) -> pandas.DataFrame:
        """One row per scope, layer, sequence, query token and key token (real tokens only): its norm.

        Columns ``scope``, ``layer``, ``batch``, ``query``, ``key`` (positions), ``query_token``, ``key_token``,
        ``norm``, and ``head`` (missing at the scopes summed over heads) where ``attn_heads`` is among ``scopes``.
        """
        import pandas as pd

        names = self.scopes if scopes is None else (scopes,) if isinstance(scopes, str) else tuple(scopes)
        frames = [self._frame(self.scope(name), batch) for name in names for batch in range(self.mask.shape[0])]
        frame = pd.concat(frames, ignore_index=True)
        for column in ("scope", "query_token", "key_token"):
            frame[column] = frame[column].astype("category")
        if "head" in frame:
            frame["head"] = frame["head"].astype("Int64")
        return frame

    def plot(
        self, scope: str = "layer", layer: int = -1, batch: int = 0, *, head: int | None = None, **options: Any
    ) -> Figure:
        """A matplotlib figure of one map, real tokens only.

        ``layer`` is the model's number of the layer, or negative: counted from the last computed one. ``head`` picks a
        head of ``attn_heads``. ``options`` go to `ffattr.plot.map_figure`.
        """
        from . import plot

        name, index = self.scope(scope), self._layer_index(layer)
        if not -self.mask.shape[0] <= batch < self.mask.shape[0]:
            raise IndexError(f"batch {batch} is out of range: there are {self.mask.shape[0]} sequences")
        values = self.maps[name][index, batch]
        title = f"{name}, layer {self.layers[index]}"
        if name == "attn_heads":
            if head is None or not -values.shape[0] <= head < values.shape[0]:
                raise ValueError(f"scope attn_heads has {values.shape[0]} heads; got head={head}: name one of them")
            values, title = values[head], f"{title}, head {head % values.shape[0]}"
        elif head is not None:
            raise ValueError(f"head={head} is for the scope attn_heads; {name} is summed over heads")
        rows, keys = self._real(batch)
        return plot.map_figure(
            values[rows][:, keys],
            [self._token(batch, self.queries[row]) for row in rows.tolist()],
            [self._token(batch, key) for key in keys.tolist()],
            **{"title": title, **options},
        )

    def _layer_index(self, layer: int) -> int:
        if -len(self.layers) <= layer < 0:
            return layer + len(self.layers)
        if layer not in self.layers:
            raise IndexError(f"layer {layer} was not computed; computed: {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def _real(self, batch: int) -> tuple[Tensor, Tensor]:
        """Rows ``[N']`` and keys ``[T']`` of a map of sequence ``batch`` that are not padding."""
        mask = self.mask[batch].cpu()
        return mask[list(self.queries)].nonzero().flatten(), mask.nonzero().flatten()

    def _token(self, batch: int, position: int) -> str:
        return self.tokens[batch][position] if self.tokens else str(position)

    def _frame(self, scope: str, batch: int) -> pandas.DataFrame:
        import numpy as np
        import pandas as pd

        rows, keys = self._real(batch)
        values = self.maps[scope][:, batch].cpu()
        values = values[..., rows, :][..., keys]
        by_head = scope == "attn_heads"
        axes = [torch.tensor(self.layers), torch.tensor(self.queries)[rows], keys]
        if by_head:
            axes.insert(1, torch.arange(values.shape[1]))
        grid = [axis.flatten().numpy() for axis in torch.meshgrid(*axes, indexing="ij")]
        query, key = grid[-2], grid[-1]
        token = np.array([self._token(batch, position) for position in range(self.mask.shape[1])], dtype=object)
        columns: dict[str, Any] = {
            "scope": scope,
            "layer": grid[0],
            "batch": batch,
            "query": query,
            "key": key,
            "query_token": token[query],
            "key_token": token[key],
            "norm": values.flatten().to(torch.promote_types(values.dtype, torch.float32)).numpy(),
        }
        if by_head:
            columns["head"] = grid[1]
        return pd.DataFrame(columns)

    def _check_shapes(self, name: str) -> None:
        sequences, tokens = self.mask.shape if self.mask.dim() == 2 else (-1, -1)
        outer, inner = (len(self.layers), sequences), (len(self.queries), tokens)
        for scope in self.scopes:
            shape = tuple(self.maps[scope].shape)
            if shape[:2] + shape[-2:] != outer + inner or len(shape) != (5 if scope == "attn_heads" else 4):
                raise FileFormatError(
                    f"{name!r}: the map {scope} has shape {list(shape)}, expected {[*outer, *inner]} (layers, "
                    "sequences, queries, tokens)"
                )


load = Attribution.load


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a temporary file beside ``path`` that replaces ``path`` if the block ends well and vanishes if not.

    In the same folder, because renaming is atomic only within a file system; with the same suffix, because writers
    tell formats by it.
    """
    target = Path(path).resolve()  # through a link to the file it names
    if target.is_dir():
        raise IsADirectoryError(f"{str(target)!r} is a folder, expected the name of a file to write")
    if target.exists() and not target.is_file():  # renaming onto a device or a pipe would take its place
        raise OSError(f"{str(target)!r} is a device or a pipe, expected the name of a file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.{secrets.token_hex(4)}{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # what the user's umask says; safetensors makes files that only the user can read
        os.replace(temporary, target)
    except BaseException:  # an interrupt as well
        temporary.unlink(missing_ok=True)
        raise


def _check_format(metadata: Mapping[str, str], name: str) -> None:
    if metadata.get("format") != "ffattr" or not metadata.get("format_version", "").isdecimal():
        raise FileFormatError(f"{name!r} is a safetensors file, but not one that ffattr's save() wrote")
    version = int(metadata["format_version"])
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"{name!r} has format version {version}, this ffattr reads up to {FORMAT_VERSION}: upgrade ffattr"
        )


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in one storage, which safetensors refuses."""
    result: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        result[name] = stored
    return result
