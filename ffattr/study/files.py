"""Studies as files in a folder: a CSV for each analysis, the small tables in Markdown, pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import plot
from ..analysis.rows import has_ff_component
from ..errors import names_missing_extra
from ..results.figures import save_figure
from ..results.files import write_text
from .frames import Study
from .tables import write_tables

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from ..results import Attribution

__all__ = ["check", "write"]

_FORMATS = ("png", "svg", "pdf")
_FORMULA = re.compile(r"[=+@\t\r].|-[^\d.]", re.DOTALL)
_DRAWN = 200  # tokens of a map that still make a picture


def check(folder: str | os.PathLike[str], formats: Sequence[str]) -> None:
    """Raises what `write` would, before anything is computed: ValueError for an unknown format, OSError for a folder
    that cannot be made or written to.

    >>> ffattr.study.check("found", ["png", "gif"])
    Traceback (most recent call last):
    ValueError: unknown format 'gif', expected some of png, svg, pdf
    """
    unknown = [name for name in formats if name not in _FORMATS]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}, expected some of {', '.join(_FORMATS)}")
    target = Path(folder)
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write into {str(target)!r}: {str(there)!r} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"cannot write into {str(target)!r}: no permission to write in {str(there)!r}")


@names_missing_extra
def write(studies: Sequence[Study], folder: str | os.PathLike[str], formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes everything that was found into ``folder``, which is made where there is none; returns the files.

    ``<analysis>.csv`` with a column ``model``, where texts that a spreadsheet would compute (``=1+1``) begin with an
    apostrophe; ``tables.md`` with what fits a page; pictures in ``formats`` (png, svg,
    pdf). Each file appears whole or not at all. Raises ValueError for an unknown format or studies of one name, OSError
    where a file cannot be written.

    >>> study = ffattr.study.of_maps("tiny", attr)
    >>> [path.name for path in ffattr.study.write([study], "found") if path.suffix != ".csv"][:2]
    ['tables.md', 'contextualization_change.png']
    """
    import pandas as pd

    check(folder, formats)
    names = [study.name for study in studies]
    if not names or len(set(map(_to_file_name, names))) < len(names):
        raise ValueError(f"studies are called {names}, expected one or more, each by a name of its own")
    frames: dict[str, pandas.DataFrame] = {}
    for analysis in dict.fromkeys(name for study in studies for name in study.frames):
        of_analysis = [study.frames[analysis].assign(model=study.name) for study in studies if analysis in study.frames]
        together = pd.concat(of_analysis, ignore_index=True)
        frames[analysis] = together[["model", *(column for column in together if column != "model")]]
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {str(target)!r}: {error.strerror or error}") from error
    written = []
    for name, frame in frames.items():
        written.append(target / f"{name}.csv")
        _write_text(written[-1], [_disarm_formulas(frame).to_csv(index=False)])
    written.append(target / "tables.md")
    _write_text(written[-1], write_tables(frames, studies))
    for name, figure in _draw_pictures(frames, studies):
        for kind in formats:
            written.append(target / f"{name}.{kind}")
            save_figure(figure, written[-1])
    return written


def _disarm_formulas(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Returns a table of which a spreadsheet computes no text: what it would take for a formula begins with an
    apostrophe."""

    def disarm(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value

    from pandas.api import types as pd_types

    found = frame.copy()
    for column in frame:
        if not pd_types.is_numeric_dtype(frame[column]):
            found[column] = frame[column].astype(object).map(disarm, na_action="ignore")
    return found


def _to_file_name(name: str) -> str:
    """Returns what stands for the name of a study in that of a file."""
    return re.sub(r"[^-.\w]+", "-", name)


def _write_text(path: Path, pieces: Iterable[str]) -> None:
    """Writes a text file; half a character, which a token may be, is written as its code."""
    write_text(path, (piece.encode("utf-8", "backslashreplace").decode() for piece in pieces))


def _draw_pictures(frames: Mapping[str, pandas.DataFrame], studies: Sequence[Study]) -> Iterator[tuple[str, Figure]]:
    """Yields the pictures, each with the name of its file."""
    if "contextualization_change" in frames:
        yield "contextualization_change", plot.change_chart(frames["contextualization_change"])
    if "alignment" in frames:
        yield "alignment", plot.alignment_chart(frames["alignment"])
    for study in studies:
        of = f"_{_to_file_name(study.name)}" if len(studies) > 1 else ""
        if "amplified_categories" in study.frames:
            title = f"{study.name}: pairs that the feed-forward network amplifies"
            yield f"amplified_categories{of}", plot.category_bars(study.frames["amplified_categories"], title)
        if "gain_balance" in study.frames:
            title = f"{study.name}: gain of the norm, and what the network writes"
            yield f"gain_balance{of}", plot.gain_chart(study.frames["gain_balance"], title)
        if "cancellation" in study.frames:
            title = f"{study.name}: without some dimensions"
            yield f"cancellation{of}", plot.cancellation_chart(study.frames["cancellation"], title)
        changes = study.frames.get("contextualization_change")
        if study.example is None or changes is None or not _fits_picture(study.example):
            continue
        yield f"scopes{of}", study.example.plot_scopes(_most_changed(changes))
        if has_ff_component(study.example.scopes):
            yield f"amplification{of}", study.example.plot_amplification()


def _fits_picture(example: Attribution) -> bool:
    """Tells whether the maps of the first sequence make a picture."""
    real = example.mask[:1]
    return 1 < int(real.sum()) <= _DRAWN and bool(real[:, list(example.queries)].any())


def _most_changed(changes: pandas.DataFrame) -> int:
    """Returns the layer whose feed-forward network (else the block, else any part of it) rearranges the map most."""
    known = changes.dropna(subset="value")
    for components in (["FF"], ["FF block"], list(known["component"])):
        some = known[known["component"].isin(components)].nlargest(1, "value")
        if len(some):
            return int(some["layer"].item())
    return int(changes["layer"].iloc[-1])
