"""The page: one HTML document that holds its maps, its style and its program, and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any, NamedTuple

from ..selection import describe_scope
from .drawing import draw_layers
from .encode import GRIDS, Coded, Grid, Sample, encode_map
from .panels import Panel, Scores

__all__ = ["render"]

_SCRIPTS = (
    "state",
    "decode",
    "colours",
    "measure",
    "pixels",
    "tokens",
    "grid",
    "pointer",
    "text",
    "scores",
    "chart",
    "strip",
    "export",
    "controls",
    "main",
)
_SMALL = 1 / 5  # of the limit: below that, finer than 1 % costs nothing that matters
_FINE = 0.01
_SAMPLED = 2**19  # entries of all maps together from which their size is told beforehand
_SLACK = 1.03  # how wrong that may be
_ESCAPED = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


def render(
    panels: Sequence[Panel],
    title: str,
    *,
    facts: Mapping[str, str] | None = None,
    measure: str = "norm",
    limit: int = 15_000_000,
) -> Iterator[str]:
    """Returns the pieces of an HTML document that shows the maps of ``panels``, at most ``limit`` bytes in UTF-8.

    Everything is checked and compressed before this returns. Values are kept within 0.02 % where the page stays
    small, less exactly the larger it gets; the page says how exactly. ``facts`` are shown below the title, ``measure``
    is what values are called.

    Raises ValueError for a panel that cannot be shown, and where the maps do not fit even at their coarsest.

        >>> from ffattr.report import Panel, render
        >>> words = ["a", "b"]
        >>> panel = Panel("1", words, [0, 1], words, [0, 1], True, [0], ["atb"], lambda scope, place: torch.eye(2))
        >>> page = "".join(render([panel], "Two words"))
        >>> page[:15], page.count("<title>Two words</title>")
        ('<!DOCTYPE html>', 1)
    """
    if not panels:
        raise ValueError("a page needs at least one panel, got none")
    for panel in panels:
        panel.check()
    if not isinstance(title, str):
        raise TypeError(f"title is {title!r}, expected a text")
    if not isinstance(limit, int):
        raise TypeError(f"limit is {limit!r}, expected a number of bytes")
    frame = _split_page(title)
    described = [_describe_panel(panel) for panel in panels]
    listed = [[name, str(value)] for name, value in (facts or {}).items()]
    head = {"title": title, "measure": measure, "facts": listed}
    fixed = sum(len(part.encode()) for part in frame) + len(_to_json(described)) + len(_to_json(head)) + 2000
    for grid in _choose_grids(panels, limit, limit - fixed):
        coded = _encode_panels(panels, grid, limit - fixed)
        if coded is not None:
            break
    else:
        raise ValueError(
            f"the page would be larger than {limit:,} bytes even with values kept within {GRIDS[-1].accuracy:.0%} "
            f"({sum(panel.entries for panel in panels):,} of them): choose fewer layers, scopes or sequences, or let "
            "attribute keep=ffattr.Pool(...)"
        )
    texts: list[str] = []
    for content, maps in zip(described, coded, strict=True):
        content["maps"] = {
            scope: [[_add_entry(one, texts) for one in parts] for parts in of] for scope, of in maps.of_pairs.items()
        }
        if content["scores"]:
            content["scores"]["maps"] = {scope: _add_entry(one, texts) for scope, one in maps.of_scores.items()}
    data = {**head, "accuracy": grid.accuracy, "floor": grid.floor, "step": grid.step, "panels": described}
    return _join_page(frame, _to_json(data), texts)


def _join_page(frame: tuple[str, str, str], data: str, texts: Iterable[str]) -> Iterator[str]:
    before, between, after = frame
    yield before
    yield f'<script type="application/json" id="data">{data}</script>\n'
    yield between
    for number, text in enumerate(texts):
        yield f'<script type="text/plain" id="map-{number}">{text}</script>\n'
    yield after


def _choose_grids(panels: Sequence[Panel], limit: int, room: float) -> Iterator[Grid]:
    """Yields grids on which the maps should fit ``room`` bytes, the finest first."""
    share = _SAMPLED / sum(panel.entries for panel in panels)
    of_pairs = (values for panel in panels for _, _, parts in panel.maps() for values in parts)
    of_scores = (values for panel in panels for _, values in panel.score_maps())
    samples = [Sample.from_map(values, values.size * min(1.0, share)) for values in chain(of_pairs, of_scores)]
    for grid in GRIDS:
        allowed = room if grid.accuracy >= _FINE else min(room, limit * _SMALL)
        if sum(sample.estimate_size(grid) for sample in samples) <= allowed * _SLACK:
            yield grid


class _CodedPanel(NamedTuple):
    """Maps of pairs by scope, layer and part, and of scores by scope."""

    of_pairs: dict[str, list[list[Coded]]]
    of_scores: dict[str, Coded]


def _encode_panels(panels: Sequence[Panel], grid: Grid, room: float) -> list[_CodedPanel] | None:
    """Encodes the maps of every panel; None as soon as they take more than ``room`` bytes."""
    coded: list[_CodedPanel] = []
    for panel in panels:
        of_panel = _CodedPanel({scope: [] for scope in panel.scopes if panel.read is not None}, {})
        for scope, values in panel.score_maps():
            of_panel.of_scores[scope] = encode_map(values, grid)
            room -= len(of_panel.of_scores[scope].text) + 110  # with its element and entry
        for scope, _, parts in panel.maps():
            of_panel.of_pairs[scope].append([encode_map(values, grid) for values in parts])
            room -= sum(len(one.text) + 110 for one in of_panel.of_pairs[scope][-1])
            if room < 0:
                return None
        if room < 0:
            return None
        coded.append(of_panel)
    return coded


def _add_entry(coded: Coded, texts: list[str]) -> list[Any]:
    texts.append(coded.text)
    return [len(texts) - 1, coded.top, coded.levels, int(coded.above), *([1] if coded.signed else [])]


def _describe_panel(panel: Panel) -> dict[str, Any]:
    return {
        "name": panel.name,
        "queries": list(panel.queries),
        "queryPositions": [int(position) for position in panel.query_positions],
        "keys": list(panel.keys),
        "keyPositions": [int(position) for position in panel.key_positions],
        "same": bool(panel.same_tokens),
        "layers": [int(layer) for layer in panel.layers],
        "scopes": list(panel.scopes),
        "words": [describe_scope(scope) for scope in panel.scopes],
        "parts": {scope: list(names) for scope, names in panel.parts.items()},
        "changes": [[int(of), name, float(value)] for of, name, value in panel.changes if math.isfinite(value)],
        "angles": [[int(of), pairs, round(median, 4), round(part, 4)] for of, pairs, median, part in panel.angles],
        "signed": panel.signed,
        "scores": None if panel.scores is None else _describe_scores(panel.scores),
    }


def _describe_scores(scores: Scores) -> dict[str, Any]:
    rest = {
        scope: {name: [float(f"{number:.7g}") for number in numbers] for name, numbers in of.items()}
        for scope, of in scores.rest.items()
    }
    values = {scope: float(value) for scope, value in scores.values.items()}
    return {
        "boundaries": list(scores.boundaries),
        "rest": rest,
        "values": values,
        "readAt": {scope: int(position) for scope, position in scores.read_at.items()},
    }


def _to_json(content: Any) -> str:
    """Returns JSON in ASCII, without a character that HTML reads."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).translate(_ESCAPED)


def _split_page(title: str) -> tuple[str, str, str]:
    """Returns the document before its data, between the data and the maps, and after them."""
    style, script = _read_file("style.css"), _join_scripts()
    policy = (
        f"default-src 'none'; script-src '{_hash_source(script)}'; style-src '{_hash_source(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = html.escape(title.encode("utf-8", "replace").decode())
    page = (
        _read_file("page.html")
        .replace("%DRAWING%", draw_layers())
        .replace("%POLICY%", policy)
        .replace("%STYLE%", style)
        .replace("%SCRIPT%", script)
    )
    before, _, rest = page.partition("%DATA%\n")
    between, _, after = rest.partition("%MAPS%\n")
    return before.replace("%TITLE%", shown), between, after


def _join_scripts() -> str:
    parts = "\n".join(_read_file(f"{name}.js") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def _hash_source(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _read_file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
