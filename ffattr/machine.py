"""Which machine this is, what was measured on it, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Replacement", "cache_file", "name_processor", "replacing", "sync", "write_cache"]


def name_processor(device: torch.device) -> str:
    """Names the GPU, or the CPU and how many cores it shows."""
    if device.type == "cuda":
        import torch

        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{names[0]}, {len(names)} cores"
    return platform.processor() or platform.machine()


def cache_file(name: str) -> Path:
    """Returns the file for what was measured on this machine; ``FFATTR_CACHE`` names another folder."""
    folder = os.environ.get("FFATTR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ffattr"
    return Path(folder).expanduser() / name


def write_cache(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all, and makes its folder. Raises OSError where it cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until what is in a file, or the names that are in a folder, would outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """The name of a temporary file beside ``path`` that replaces ``path`` if the block ends well and vanishes if not.

    In the same folder, because renaming is atomic only within a file system; with the same suffix, because writers
    tell formats by it. For ``durable`` see `Replacement`.
    """
    replacement = Replacement(path, durable)
    try:
        yield replacement.temporary
        replacement.finish()
    except BaseException:  # an interrupt as well
        replacement.discard()
        raise


class Replacement:
    """A temporary file that takes the place of ``path`` in the end, or vanishes.

    With ``durable`` a loss of power leaves the old file or the new one as well: the new one is on the disk before it
    takes the place, and the folder with its name before `finish` returns.
    """

    def __init__(self, path: str | os.PathLike[str], durable: bool = False) -> None:
        target = Path(path).resolve()  # through a link to the file it names
        if target.is_dir():
            raise IsADirectoryError(f"{str(target)!r} is a folder, expected the name of a file to write")
        if target.exists() and not target.is_file():  # renaming onto a device or a pipe would take its place
            raise OSError(f"{str(target)!r} is a device or a pipe, expected the name of a file to write")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
        self._target, self._durable = target, durable
        self.temporary = target.with_name(f".{target.stem}.{os.getpid()}.{secrets.token_hex(4)}{target.suffix}")
        self.temporary.touch(exist_ok=False)
        self._mode = stat.S_IMODE(self.temporary.stat().st_mode)

    def finish(self) -> None:
        self.temporary.chmod(self._mode)  # what the user's umask says; safetensors' files only the user can read
        if self._durable:
            sync(self.temporary)
        os.replace(self.temporary, self._target)
        if self._durable:
            sync(self._target.parent)

    def discard(self) -> None:
        self.temporary.unlink(missing_ok=True)
