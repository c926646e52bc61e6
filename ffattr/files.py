"""Result files: tensors with a description in JSON, in safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import FfattrError

__all__ = ["FORMAT_VERSION", "FileFormatError", "read", "replacing", "write"]

FORMAT_VERSION = 1
"""Version of the file layout; raised when an older `read` could not make sense of the file."""


class FileFormatError(FfattrError, ValueError):
    """A file is not one that ffattr wrote, is damaged, or is of a newer format."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Writes a safetensors file that `read` (and any safetensors reader) reads; ``content`` is its JSON metadata.

    The file appears whole or not at all: it is written under another name beside ``path`` and then renamed.
    """
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


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any]:
    """Tensors on the CPU, and the description, of a file that `write` wrote.

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
        return tensors, json.loads(metadata["attribution"])
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error


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
