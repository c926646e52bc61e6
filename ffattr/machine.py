"""Which machine this is, what was measured on it, and files that appear whole or not at all."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import secrets
import stat
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import torch

__all__ = ["Cache", "Replacement", "cache_file", "name_processor", "replacing", "sync"]

V = TypeVar("V")
_LARGEST_CACHE = 2**24  # bytes
_PATIENCE = 30.0  # seconds for what takes thousandths of one

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
    """Returns the file for what was measured on this machine, in the folder that the system has for such files;
    ``FFATTR_CACHE`` names another one."""
    import platformdirs

    return Path(os.environ.get("FFATTR_CACHE") or platformdirs.user_cache_path("ffattr")).expanduser() / name


@dataclass(frozen=True)
class Cache(Generic[V]):
    """A file of JSON with values by name, which any number of processes read and add to: none loses what another adds.

    ``name`` is that of the file, ``written_by`` the command that measures anew. ``parse`` makes a value of what is in
    the file, and raises ValueError, TypeError or AttributeError for anything else; ``describe`` undoes it. What cannot
    be read, the whole file or single values, counts as not there, with a warning.
    """

    name: str
    written_by: str
    parse: Callable[[Any], V]
    describe: Callable[[V], Any]

    def read(self) -> Mapping[str, V]:
        """Returns all values, by what other processes have written until now."""
        file = cache_file(self.name)
        try:
            found = file.stat()
        except OSError:
            return {}
        return _read_values(self, file, (found.st_ino, found.st_size, found.st_mtime_ns))

    def update(self, change: Callable[[Mapping[str, V]], Mapping[str, V]]) -> Path:
        """Puts ``change`` of all values in their place, while no other process does; returns the file.

        Raises OSError where it cannot be written, TimeoutError where another process keeps its folder.
        """
        file = cache_file(self.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock_folder(file.parent):
            described = {name: self.describe(value) for name, value in change(self.read()).items()}
            with replacing(file) as temporary:
                text = json.dumps(described, indent=1, sort_keys=True) + "\n"
                temporary.write_text(text, encoding="utf-8")
        return file


@functools.lru_cache(maxsize=8)
def _read_values(cache: Cache[V], file: Path, version: tuple[int, ...]) -> dict[str, V]:
    del version  # part of the key: what another process has written since counts
    found = {}
    try:
        for name, value in _load_object(file).items():
            try:
                found[name] = cache.parse(value)
            except (ValueError, TypeError, AttributeError) as error:
                _warn_of_cache(cache, file, f"{name}: {error}")
    except (OSError, ValueError, RecursionError) as error:
        _warn_of_cache(cache, file, str(error))
    return found


def _load_object(file: Path) -> dict[str, Any]:
    """Raises OSError or ValueError where a file holds no JSON object, or is none."""
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to would block
    with open(handle, encoding="utf-8") as stream:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is a folder, a device or a pipe")
        if about.st_size > _LARGEST_CACHE:
            raise ValueError(f"it has {about.st_size} bytes, expected {_LARGEST_CACHE} at most")
        found = json.load(stream)
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def _warn_of_cache(cache: Cache[V], file: Path, why: str) -> None:
    warnings.warn(f"{file} is not what `{cache.written_by}` writes ({why[:200]}): ignored; delete it", stacklevel=4)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Waits until no other process or thread is in here, where the system has locks of files."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has kept {str(folder)!r} for {_PATIENCE:.0f} s") from None
                time.sleep(0.01)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(handle)


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
        if not isinstance(path, (str, os.PathLike)) or "\0" in os.fspath(path):
            raise TypeError(f"path is {path!r}, expected the name of a file to write")
        target = Path(path).resolve()  # through a link to the file it names
        if target.is_dir():
            raise IsADirectoryError(f"{str(target)!r} is a folder, expected the name of a file to write")
        if target.exists() and not target.is_file():  # renaming onto a device or a pipe would take its place
            raise OSError(f"{str(target)!r} is a device or a pipe, expected the name of a file to write")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
        _remove_left_files(target.parent)
        self._path, self._target, self._durable = path, target, durable
        self._locked: list[int] = []  # handles of files
        name = f".{target.stem}.{os.getpid()}.{secrets.token_hex(4)}.partial{target.suffix}"
        self.temporary = target.with_name(name)
        _being_written[name] = self
        # Before there is anything to remove: an interrupt may come between any two lines, and in `discard` as well.
        self._remove = weakref.finalize(self, _remove_temporary, self.temporary, self._locked, os.getpid())
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
            self.temporary.chmod(self._mode)
            if self._durable:
                sync(self.temporary)
            os.replace(self.temporary, self._target)
            self._remove.detach()
            _close_all(self._locked)
            if self._durable:
                sync(self._target.parent)

    def discard(self) -> None:
        self._remove()

    def _hold_lock(self) -> None:
        """Locks the temporary file until it is closed, or until this process ends in any way."""
        if sys.platform != "win32":
            self._locked.append(os.open(self.temporary, os.O_RDWR))
            _lock_file(self._locked[0])


_being_written: weakref.WeakValueDictionary[str, Replacement] = weakref.WeakValueDictionary()
"""Temporary files of this process by their names, those left out that an interrupt kept from being removed."""


def _remove_temporary(file: Path, locked: list[int], process: int) -> None:
    """Removes the temporary file of ``process``, unless this is a fork of it."""
    if os.getpid() == process:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    _close_all(locked)


def _close_all(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


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
    """Removes temporary files that nobody writes any more: those of processes that are neither alive here nor, on
    another machine, holding the lock, and of this one what an interrupt has left."""
    if sys.platform == "win32":
        return
    with suppress(OSError):
        for name in os.listdir(folder):
            found = _TEMPORARY.fullmatch(name)
            if found is None:
                continue
            process = int(found[1])
            if name not in _being_written if process == os.getpid() else not _is_alive(process):
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
