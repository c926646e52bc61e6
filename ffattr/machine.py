"""Which machine this is, what was measured on it, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import torch

__all__ = ["Replacement", "cache_file", "name_processor", "replacing", "sync", "write_cache"]

_TEMPORARY = re.compile(r"\..*\.(\d+)\.[0-9a-f]{8}\.partial(\..*)?", re.DOTALL)
"""What temporary files are called, with the process that writes them."""


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
    tell formats by it. For ``durable`` see `Replacement`. An OSError names ``path`` and not the temporary file.
    """
    replacement = Replacement(path, durable)
    try:
        with _name_path(path, replacement.temporary):
            yield replacement.temporary
        replacement.finish()
    except BaseException:  # an interrupt as well
        replacement.discard()
        raise


class Replacement:
    """A temporary file that takes the place of ``path`` in the end, or vanishes.

    With ``durable`` a loss of power leaves the old file or the new one as well: the new one is on the disk before it
    takes the place, and the folder with its name before `finish` returns. A file that is replaced keeps its mode, a new
    one has that of the user's umask. What processes that were killed have left in the folder is removed first.
    """

    def __init__(self, path: str | os.PathLike[str], durable: bool = False) -> None:
        target = Path(path).resolve()  # through a link to the file it names
        if target.is_dir():
            raise IsADirectoryError(f"{str(target)!r} is a folder, expected the name of a file to write")
        if target.exists() and not target.is_file():  # renaming onto a device or a pipe would take its place
            raise OSError(f"{str(target)!r} is a device or a pipe, expected the name of a file to write")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
        _remove_left_files(target.parent)
        self._path, self._target, self._durable = path, target, durable
        self._handle = -1
        name = f".{target.stem}.{os.getpid()}.{secrets.token_hex(4)}.partial{target.suffix}"
        self.temporary = target.with_name(name)
        try:
            with _name_path(path, self.temporary):
                self.temporary.touch(exist_ok=False)
                self._hold_lock()
                self._mode = stat.S_IMODE((target if target.exists() else self.temporary).stat().st_mode)
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        with _name_path(self._path, self.temporary):
            self._hold_lock()  # anew: safetensors puts a file of its own in its place, which only the user can read
            self.temporary.chmod(self._mode)
            if self._durable:
                sync(self.temporary)
            os.replace(self.temporary, self._target)
            self._release_lock()
            if self._durable:
                sync(self._target.parent)

    def discard(self) -> None:
        self.temporary.unlink(missing_ok=True)
        self._release_lock()

    def _hold_lock(self) -> None:
        """Locks the temporary file until it is closed, or until this process ends in any way."""
        self._release_lock()
        if sys.platform != "win32":
            self._handle = os.open(self.temporary, os.O_RDWR)
            _lock_file(self._handle)

    def _release_lock(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


@contextmanager
def _name_path(path: str | os.PathLike[str], temporary: Path) -> Iterator[None]:
    """Lets an OSError about the temporary file name the one that the user knows."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (str(temporary), None):
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def _lock_file(handle: int) -> bool:
    """Returns whether the file is locked now: False where another process holds it, or it knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_left_files(folder: Path) -> None:
    """Removes the temporary files of processes that are gone: neither alive here nor, elsewhere, holding the lock."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        for name in os.listdir(folder):
            found = _TEMPORARY.fullmatch(name)
            if found is not None and not _is_alive(int(found[1])):
                _remove_unlocked(folder / name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove_unlocked(file: Path) -> None:
    with suppress(OSError):
        handle = os.open(file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if _lock_file(handle):
                file.unlink()
        finally:
            os.close(handle)
