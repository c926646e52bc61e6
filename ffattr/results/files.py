"""Result files: tensors with a description in JSON, in safetensors, written whole or not at all.

Two ways to one, both read by `read`: `write`, of tensors that there are, and `Reserved`, whose large tensors are filled
in on the disk while they are computed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from ..errors import FileFormatError
from ..machine import Replacement, replacing
from .saved.checksum import compute_checksum, view_bytes
from .saved.write import DTYPES, save_file

__all__ = ["FORMAT_VERSION", "Reserved", "read", "write", "write_text"]

FORMAT_VERSION = 2
"""Newest version of the file layout; raised when an older `read` could not make sense of the file.

1: the description is metadata of the header, which `write` still makes. 2: it is the tensor `_DESCRIPTION`, because the
header of a `Reserved` file comes first and must not grow.
"""

_DESCRIPTION, _PADDING = "description", "padding"
_CHECKSUM = "checksum"
_METADATA = {"format", "format_version", "torch_version", "attribution", _CHECKSUM}  # a damaged name is none of these
_ATTEMPTS = 100
_OPEN_FILES = Path("/proc/self/fd")  # of Linux: names of what a process has open
_HEADER = 2**16  # bytes; an entry takes up to 200 of them


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Writes a safetensors file that `read` (and any safetensors reader) reads; ``content`` is its JSON metadata.

    The file appears whole or not at all: it is written under another name beside ``path`` and then renamed.
    """
    text, stored = json.dumps(content, default=str), _make_storable(tensors)
    metadata = _make_metadata(1, compute_checksum(stored, text.encode())) | {"attribution": text}
    with replacing(path, durable=True) as temporary:
        save_file(stored, temporary, metadata)


def write_text(path: str | os.PathLike[str], pieces: Iterable[str]) -> None:
    """Writes UTF-8 text that comes in pieces: the file appears whole or not at all."""
    with replacing(path, durable=True) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(pieces)


def read(path: str | os.PathLike[str], verify: bool = True) -> tuple[dict[str, Tensor], Any]:
    """Reads tensors, on the CPU, and the description of a file that `write` or `Reserved` wrote.

    With ``verify`` all of it is compared with the checksum that was saved with it; files of older versions have none.
    The tensors are mapped: what is not looked at is not read, and what is changed does not reach the file. Raises
    `FileNotFoundError`, or `FileFormatError` that says whether the file is damaged, foreign or too new.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {path!r}, expected the name of a file that save() wrote")
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {name!r}")
    with _hold_file(path) as held:
        tensors, metadata = _read_unchanged(held, name)
    _check_format(metadata, name)
    packed = tensors.pop(_DESCRIPTION, None)
    if packed is None and "attribution" not in metadata:
        raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles its description")
    text = metadata["attribution"].encode() if packed is None else bytes(view_bytes(packed))
    expected = metadata.get(_CHECKSUM)
    if verify and expected is not None and compute_checksum(tensors, text) != expected:
        raise FileFormatError(
            f"{name!r} is damaged: its checksum is not {expected}, which was saved with it. Make it again with save(), "
            "or read what there is with ffattr.load(path, verify=False)"
        )
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error


@contextmanager
def _hold_file(path: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """Gives a name that stays that of the file when another one takes its place, where the system has such names.

    safetensors opens a path twice, for the header and for the numbers.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        own = _OPEN_FILES / str(handle)
        yield own if own.exists() else path
    finally:
        os.close(handle)


def _read_unchanged(path: str | os.PathLike[str], name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata of a file ``name``; anew where ``path`` became another one in the meantime."""
    for _ in range(_ATTEMPTS):
        before = _identify_file(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                metadata = file.metadata() or {}
        except OSError:
            raise
        except Exception as error:  # the library has several kinds for what it cannot read
            if _identify_file(path) != before:
                continue
            raise FileFormatError(
                f"{name!r} is not a safetensors file, or is cut off or damaged ({error}); make it again with save()"
            ) from error
        if _identify_file(path) == before:
            return tensors, metadata
    raise FileFormatError(f"{name!r} was replaced each of the {_ATTEMPTS} times that it was opened; read a copy")


def _identify_file(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns what tells a file from one that took its place."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Reserved:
    """A file of which some tensors are filled in place, memory-mapped, before the rest of it is known.

    ``tensors`` are zeros of ``shapes``, by name. Nothing is at ``path`` before `seal`; until then the numbers are in a
    temporary file beside it whose header is zero, which no reader takes for a safetensors file. Room on the disk is
    taken at once, with ``spare`` bytes for what `seal` adds: a full disk is an `OSError` here and not, hours later, the
    signal that a write to a mapped page ends in.
    """

    def __init__(
        self, path: str | os.PathLike[str], dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], spare: int = 0
    ) -> None:
        self._path, self._dtype, self._shapes = path, dtype, dict(shapes)
        self._sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        self._end = _HEADER + sum(self._sizes.values())
        self._replacement = Replacement(path)
        self.tensors: dict[str, Tensor] = {}
        try:
            with open(self._replacement.temporary, "r+b") as file:
                _reserve_room(file, self._end + spare, os.fspath(path))
            storage = torch.UntypedStorage.from_file(str(self._replacement.temporary), shared=True, nbytes=self._end)
            at = _HEADER
            for name, shape in shapes.items():
                part = storage[at : at + self._sizes[name]]
                self.tensors[name] = torch.asarray(part, dtype=torch.uint8).view(dtype).view(shape)
                at += self._sizes[name]
        except BaseException:
            self.discard()
            raise

    def seal(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Adds the other ``tensors`` (those filled in place may be among them) and the description: a whole file.

        A failure leaves neither the file nor the temporary one.
        """
        try:
            added = _make_storable({name: tensor for name, tensor in tensors.items() if name not in self._shapes})
            text = json.dumps(content, default=str).encode()
            added[_DESCRIPTION] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            padding = -self._end % 8
            parts = [(_PADDING, torch.zeros(padding, dtype=torch.uint8))] if padding else []
            parts += sorted(added.items(), key=lambda part: -part[1].element_size())  # whatever follows is aligned
            held = self.tensors | dict(parts)
            del held[_DESCRIPTION]
            header = self._make_header(parts, compute_checksum(held, text))
            with open(self._replacement.temporary, "r+b") as file:
                file.seek(self._end)
                file.writelines(tensor.flatten().view(torch.uint8).numpy().data for _, tensor in parts)
                file.truncate()
                file.seek(8)
                file.write(header)
                _sync_file(file)
                file.seek(0)
                file.write(len(header).to_bytes(8, "little"))
                _sync_file(file)
            self._replacement.finish()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes the temporary file, if there still is one."""
        self._replacement.discard()

    def _make_header(self, parts: list[tuple[str, Tensor]], checksum: str) -> bytes:
        """Returns the header of the tensors filled in place, then of ``parts``; ValueError where it is too long."""
        entries: dict[str, Any] = {"__metadata__": _make_metadata(FORMAT_VERSION, checksum)}
        described = [(name, self._dtype, shape, self._sizes[name]) for name, shape in self._shapes.items()]
        described += [(name, part.dtype, tuple(part.shape), part.nbytes) for name, part in parts]
        at = 0
        for name, dtype, shape, size in described:
            entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(entries).encode()
        room = _HEADER - 8
        if len(text) > room:
            raise ValueError(
                f"{len(described)} tensors do not fit the header of {os.fspath(self._path)!r} ({len(text)} bytes of "
                f"{room}): ask for fewer scopes"
            )
        return text.ljust(room)  # the format allows spaces


def _reserve_room(file: BinaryIO, size: int, name: str) -> None:
    """Makes ``file`` ``size`` bytes of zeros that the disk has room for."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.writelines(bytes(min(2**24, size - start)) for start in range(0, size, 2**24))
            file.flush()
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for {size / 2**30:.2f} GiB of maps ({error.strerror}): free some, ask for fewer layers or "
            "queries, or keep them in a smaller dtype",
            name,
        ) from error


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _make_metadata(version: int, checksum: str) -> dict[str, str]:
    """Returns the metadata by which `read` knows its files."""
    known = {"format": "ffattr", "format_version": str(version), "torch_version": str(torch.__version__)}
    return {**known, _CHECKSUM: checksum}


def _check_format(metadata: Mapping[str, str], name: str) -> None:
    if metadata.get("format") != "ffattr" or not metadata.get("format_version", "").isdecimal():
        raise FileFormatError(f"{name!r} is a safetensors file, but not one that ffattr's save() wrote")
    if unknown := sorted(metadata.keys() - _METADATA):
        raise FileFormatError(
            f"{name!r} is damaged, or newer than this ffattr: nothing is known of {unknown[0]!r} in it"
        )
    version = int(metadata["format_version"])
    if version > FORMAT_VERSION:
        raise FileFormatError(
            f"{name!r} has format version {version}, this ffattr reads up to {FORMAT_VERSION}: upgrade ffattr"
        )


def _make_storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
