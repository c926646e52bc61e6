"""The values that the texts of options stand for. torch is imported only where an option needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..selection import parse_indices

if TYPE_CHECKING:
    from ..results.keep import Keep

__all__ = ["check_folders", "parse_dtype", "parse_ig", "parse_keep", "parse_layers", "parse_position", "read_text"]


def check_folders(*files: Path | None) -> None:
    """Raises FileNotFoundError for a file to write in a folder that is not there."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"cannot write {str(file)!r}: there is no folder {str(file.parent)!r}")


def read_text(given: str | None, file: Path | None) -> str:
    """Returns what is to be read: ``given`` or the contents of ``file``. Raises ValueError or OSError."""
    if (given is None) == (file is None):
        raise ValueError("give either TEXT or --file FILE" + (", not both" if given is not None else ""))
    if file is None:
        content = given or ""
    else:
        try:
            content = file.read_text(encoding="utf-8-sig")  # a mark at its beginning is no text
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        except OSError as error:
            raise OSError(f"cannot read {str(file)!r}: {error.strerror}") from error
    if not content.strip():
        raise ValueError("the text is empty: there is nothing to map")
    return content


def parse_layers(given: str | None) -> list[int] | slice | None:
    """Reads ``"0,3,-1"`` or ``"0:4"``. Raises ValueError for anything else."""
    if given is None:
        return None
    try:
        return parse_indices(given)
    except ValueError as error:
        raise ValueError(f"--layers {error}") from None


def parse_position(given: str | None) -> int | str | None:
    """Reads a number, ``cls`` or ``mask``. Raises ValueError for anything else."""
    if given in (None, "cls", "mask"):
        return given
    try:
        return int(given or "")
    except ValueError:
        raise ValueError(f"--position {given!r}: expected a number, cls or mask") from None


def parse_ig(given: str) -> Any:
    """Reads ``exact``, ``riemann:STEPS[:RULE]`` or ``gauss:NODES``. Raises ValueError for anything else."""
    if given == "exact":
        return given

    from ..decomposition.integrated_gradients import GaussLegendre, Riemann

    name, *rest = given.split(":")
    rule: Any = rest[1:]  # checked by Riemann itself
    if name == "riemann" and len(rest) in (1, 2) and rest[0].isdecimal():
        return Riemann(int(rest[0]), *rule)
    if name == "gauss" and len(rest) == 1 and rest[0].isdecimal():
        return GaussLegendre(int(rest[0]))
    raise ValueError(f"--ig {given!r}: expected exact, riemann:STEPS[:RULE] or gauss:NODES, for instance riemann:50")


def parse_dtype(given: str | None) -> Any:
    """Returns the torch dtype of this name. Raises ValueError where there is none."""
    if given is None:
        return None

    import torch

    found = getattr(torch, given, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"--dtype {given!r} is no torch dtype; try float32, bfloat16 or float64")
    return found


def parse_keep(top: int | None, pool: int | None) -> str | Keep:
    """Returns what becomes of the maps. Raises ValueError for both, or for fewer than one entry or token."""
    if top is not None and pool is not None:
        raise ValueError(f"--top {top} and --pool {pool} are both given: expected one of them at most")
    for name, count in (("--top", top), ("--pool", pool)):
        if count is not None and count < 1:
            raise ValueError(f"{name} {count}: expected at least 1")
    if top is not None:
        from ..results.keep import TopK

        return TopK(top)
    if pool is not None:
        from ..results.keep import Pool

        return Pool(pool)
    return "dense"
