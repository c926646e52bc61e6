"""The values that the texts of options stand for. torch is imported only where an option needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..selection import parse_indices

if TYPE_CHECKING:
    from ..results.keep import Keep

__all__ = [
    "DTYPES",
    "check_choice",
    "check_folders",
    "check_layers",
    "check_picture",
    "check_scopes",
    "parse_dtype",
    "parse_ig",
    "parse_keep",
    "parse_layers",
    "parse_method",
    "parse_position",
    "parse_queries",
    "read_text",
]

DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn")
_PICTURES = (".png", ".svg", ".pdf")
_METHODS = ("auto", "direct", "operator", "mixed", "pairs")
_SCOPE = re.compile(
    r"(?:(?:encoder|decoder|cross)\.)?(?:layer|all|attn(?:_heads|_res)?|atb(?:_ln)?(?:_ff(?:_res(?:_ln)?|_experts)?)?)"
)
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # of layers, in configurations


def check_choice(option: str, given: str, known: Sequence[str]) -> None:
    """Raises ValueError for a value that is none of those known."""
    if given not in known:
        raise ValueError(f"{option} {given!r}: expected one of {', '.join(known)}")


def check_scopes(given: Sequence[str]) -> None:
    """Raises ValueError for what is no scope of any model."""
    wrong = next((name for name in given if not _SCOPE.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(
            f"--scope {wrong!r}: expected layer, all, attn_heads, attn, attn_res, atb, atb_ff, atb_ff_res, "
            "atb_ff_res_ln, in a pre-LN model atb_ln, atb_ln_ff, atb_ln_ff_res (`ffattr check MODEL` lists a model's)"
        )


def check_layers(model: str, given: list[int] | slice | None, option: str = "--layers") -> None:
    """Raises ValueError for a layer that the model in a folder has not; of other models nothing is known yet."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    counts = [config[name] for name in _COUNTS if isinstance(config.get(name), int)]
    if not counts or not isinstance(given, list) or config.get("is_encoder_decoder"):
        return
    wrong = next((layer for layer in given if not -counts[0] <= layer < counts[0]), None)
    if wrong is not None:
        raise ValueError(f"{option} {wrong}: the model has {counts[0]} layers, 0 to {counts[0] - 1}")


def check_picture(file: Path | None) -> None:
    """Raises ValueError for a picture in a format that its name does not tell, or that is not written."""
    if file is not None and file.suffix.lower() not in _PICTURES:
        raise ValueError(f"{str(file)!r}: expected the name of a picture, {', '.join(_PICTURES)}")


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


def parse_queries(given: str | None) -> list[int] | slice | None:
    """Reads ``"0,3,-1"`` or ``"0:4"``. Raises ValueError for anything else."""
    try:
        return None if given is None else parse_indices(given)
    except ValueError as error:
        raise ValueError(f"--queries {error}") from None


def parse_method(given: str) -> Any:
    """Reads the name of a method, or ``sketch``, ``sketch:COMPONENTS:PROJECTIONS`` or ``sketch:TOLERANCE``.

    Raises ValueError for anything else.
    """
    name, *rest = given.split(":")
    if name != "sketch":
        check_choice("--method", given, (*_METHODS, "sketch"))
        return given

    from ..decomposition.sketch import Sketch

    try:
        if len(rest) == 1:
            return Sketch(tolerance=float(rest[0]))
        if len(rest) in (0, 2):
            return Sketch(*map(int, rest))
    except ValueError as error:
        raise ValueError(f"--method {given!r}: {error}") from None
    raise ValueError(f"--method {given!r}: expected sketch, sketch:COMPONENTS:PROJECTIONS or sketch:TOLERANCE")


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
    check_choice("--dtype", given, DTYPES)

    import torch

    return getattr(torch, given)


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
