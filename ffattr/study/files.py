"""Studies as files in a folder: a CSV for each analysis, the small tables in Markdown, pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import plot
from ..files import replacing, write_text
from .frames import Study
from .tables import tables

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["write"]

_FORMATS = ("png", "svg", "pdf")
_DRAWN = 200  # tokens of a map that still make a picture


def write(studies: Sequence[Study], folder: str | os.PathLike[str], formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes everything that was found into ``folder``, which is made where there is none; returns the files.

    ``<analysis>.csv`` with a column ``model``; ``tables.md`` with what fits a page; pictures in ``formats`` (png, svg,
    pdf). Each file appears whole or not at all. Raises ValueError for an unknown format or studies of one name, OSError
    where a file cannot be written.

    >>> study = ffattr.study.of_maps("tiny", attr)
    >>> [path.name for path in ffattr.study.write([study], "found") if path.suffix != ".csv"][:2]
    ['tables.md', 'contextualization_change.png']
    """
    import pandas as pd

    unknown = [name for name in formats if name not in _FORMATS]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}, expected some of {', '.join(_FORMATS)}")
    names = [study.name for study in studies]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"studies are called {names}, expected one or more, each by a name of its own")
    frames: dict[str, pandas.DataFrame] = {}
    for analysis in dict.fromkeys(name for study in studies for name in study.frames):
        of_analysis = [study.frames[analysis].assign(model=study.name) for study in studies if analysis in study.frames]
        together = pd.concat(of_analysis, ignore_index=True)
        frames[analysis] = together[["model", *(column for column in together if column != "model")]]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, frame in frames.items():
        written.append(target / f"{name}.csv")
        write_text(written[-1], [frame.to_csv(index=False)])
    written.append(target / "tables.md")
    write_text(written[-1], tables(frames, studies))
    for name, figure in _pictures(frames, studies):
        for kind in formats:
            written.append(target / f"{name}.{kind}")
            with replacing(written[-1]) as temporary:
                figure.savefig(temporary, format=kind, dpi=150)
    return written


def _pictures(frames: Mapping[str, pandas.DataFrame], studies: Sequence[Study]) -> Iterator[tuple[str, Figure]]:
    """By the names of their files."""
    if "contextualization_change" in frames:
        yield "contextualization_change", plot.change_chart(frames["contextualization_change"])
    for study in studies:
        of = f"_{study.name}" if len(studies) > 1 else ""
        if "amplified_categories" in study.frames:
            title = f"{study.name}: pairs that the feed-forward network amplifies"
            yield f"amplified_categories{of}", plot.category_bars(study.frames["amplified_categories"], title)
        if "cancellation" in study.frames:
            title = f"{study.name}: without some dimensions"
            yield f"cancellation{of}", plot.cancellation_chart(study.frames["cancellation"], title)
        example = study.example
        changed = "contextualization_change" in study.frames
        if example is not None and changed and 1 < int(example.mask[0].sum()) <= _DRAWN:
            yield f"scopes{of}", example.plot_scopes(_most_changed(study))
            yield f"amplification{of}", example.plot_amplification()


def _most_changed(study: Study) -> int:
    """The layer whose feed-forward network rearranges the map most."""
    frame = study.frames["contextualization_change"]
    one = frame[frame["component"].isin(["FF", "FF block"])].sort_values("component")
    return int(one.loc[one.groupby("component")["value"].idxmax().iloc[0], "layer"])
