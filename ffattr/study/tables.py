"""Frames of studies as Markdown, those that fit a page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..plot.charts import name_category
from .frames import Study

if TYPE_CHECKING:
    import pandas

__all__ = ["write_tables"]

_MARKS = re.compile(r"([\\`*_|~&<$]|\](?=[(\[:])|:(?=//)|(?<=www)\.)", re.IGNORECASE)
"""What Markdown would take for links, pictures, code or HTML: tokens are none of these."""
_LINE_ENDS = {ord(end): "⏎" for end in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}  # those that any reader may see
_NAMED = 10  # most amplified pairs of each layer


def write_tables(frames: Mapping[str, pandas.DataFrame], studies: Sequence[Study]) -> Iterator[str]:
    """Yields the lines of one Markdown document: a heading and a table per analysis, then what was left out and why."""
    yield "# " + ", ".join(_escape_text(study.name) for study in studies) + "\n"
    for name, (heading, rule) in _TABLES.items():
        if name in frames:
            yield f"\n## {heading}\n\n"
            for model, of_model in frames[name].groupby("model", sort=False):
                if len(studies) > 1:
                    yield f"{_escape_text(str(model))}\n\n"
                yield _to_markdown(rule(of_model)) + "\n"
    left_out = [
        f"- {_escape_text(study.name)}, {name.replace('_', ' ')}: {_escape_text(why)}\n"
        for study in studies
        for name, why in study.left_out.items()
    ]
    if left_out:
        yield "\n## Left out\n\n"
        yield from left_out


def _pivot_changes(frame: pandas.DataFrame) -> pandas.DataFrame:
    # What is not defined anywhere, as of a text of one token, has its place too.
    told = frame.assign(said=[_format_bounds(*row) for row in _read_bounds(frame)])
    wide = told.pivot(index="layer", columns="component", values="said")
    return wide[list(dict.fromkeys(frame["component"]))].fillna("nan").reset_index()


def _read_bounds(frame: pandas.DataFrame) -> Iterator[tuple[float, float, float]]:
    """Yields the values with their bounds; NaN where a frame has none."""
    nothing = [math.nan] * len(frame)
    yield from zip(frame["value"], frame.get("low", nothing), frame.get("high", nothing), strict=True)


def _format_bounds(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _list_angles(frame: pandas.DataFrame) -> pandas.DataFrame:
    return frame[["layer", "pairs_of", "median", "negative", "ratio", "removed"]]


def _list_gains(frame: pandas.DataFrame) -> pandas.DataFrame:
    return frame.groupby("layer")["rho"].first().reset_index()


def _list_strongest_pairs(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Lists the first pairs of each layer that read differently, with how often they are among all that were kept."""

    def join_names(pairs: pandas.Series[str]) -> str:
        counts = pairs.value_counts()
        first = pairs.drop_duplicates().head(_NAMED)
        return ", ".join(pair if counts[pair] == 1 else f"{pair} ({counts[pair]} times)" for pair in first)

    marks = "^[Ġ▁]"  # of a space before the token
    query, key = (frame[of].astype(str).str.replace(marks, "", regex=True) for of in ("query_token", "key_token"))
    found = frame.assign(pair=query + " ← " + key).groupby("layer")["pair"].agg(join_names)
    return found.rename("query ← key, most amplified first").reset_index()


def _average_columns(*values: str) -> Callable[[Any], Any]:
    """Returns a rule that averages the columns ``values`` over each layer."""

    def average_layers(frame: pandas.DataFrame) -> pandas.DataFrame:
        return frame.groupby("layer")[list(values)].mean().reset_index()

    return average_layers


def _average_categories(frame: pandas.DataFrame) -> pandas.DataFrame:
    found = frame.groupby("category", sort=False)[["share", "base_rate"]].mean()
    found["lift"] = found["share"] / found["base_rate"]
    found.index = found.index.map(name_category)
    return found.reset_index()


def _pivot_removed(frame: pandas.DataFrame) -> pandas.DataFrame:
    rows = ["order", "component"]
    return frame.pivot_table(index=rows, columns="removed", values="value", sort=False, dropna=False).reset_index()


_TABLES: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "contextualization_change": (
        "Contextualization change, 1 - Spearman's rho [95 % of draws of sentences]",
        _pivot_changes,
    ),
    "amplified_pairs": ("Pairs that the feed-forward network amplifies most", _list_strongest_pairs),
    "amplified_categories": (
        "Categories of amplified pairs, and of all pairs (means over layers)",
        _average_categories,
    ),
    "alignment": (
        "Cosine of the network's vector and of what bypasses it, its share below zero, and their lengths' ratio",
        _list_angles,
    ),
    "gain_balance": ("Rank correlation of the norm's gain and what the network writes, over dimensions", _list_gains),
    "mixing_ratio": ("Context-mixing ratio after the attention block", _average_columns("ratio")),
    "norm_balance": (
        "Norms of the network's output and of what bypasses it",
        _average_columns("ff", "bypass", "ratio"),
    ),
    "cancellation": ("Contextualization change without some dimensions (how many; means over layers)", _pivot_removed),
}


def _escape_text(text: str) -> str:
    """Returns text that Markdown shows as it is; a line break in a token would end its cell."""
    return _MARKS.sub(r"\\\1", text).translate(_LINE_ENDS)


def _to_markdown(frame: pandas.DataFrame) -> str:
    """Returns a table in GitHub's dialect."""

    def format_cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else _escape_text(str(value))

    head = [" | ".join(map(str, frame.columns)), " | ".join("---" for _ in frame.columns)]
    rows = [" | ".join(map(format_cell, row)) for row in frame.itertuples(index=False)]
    return "".join(f"| {row} |\n" for row in (*head, *rows))
