"""Pictures of an `Attribution`: which numbers and labels `ffattr.plot` draws, and their way into files.

Shapes: ``N`` query tokens, ``T`` columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import plot
from ..analysis import ff_amp_maps
from ..analysis.rows import check_one_stack
from ..analysis.words import Words, mark_of, spell_tokens
from ..machine import replacing
from ..selection import describe_scope, integer, layer_place
from .contents import Contents, Ticks, drop_padding, label_axes, mark_own_tokens, number_expert, read_map
from .scope_names import extra_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_amplification", "draw_arcs", "draw_map", "draw_scopes", "list_for_bertviz", "save_figure"]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that the suffix of ``path`` names: the file appears whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def draw_map(
    contents: Contents,
    scope: str,
    layer: int,
    batch: int,
    head: int | None,
    expert: int | str | None,
    options: Mapping[str, Any],
) -> Figure:
    """Does `Attribution.plot`."""
    place = layer_place(layer, contents.layers)
    values = read_map(contents, scope, place, batch)
    title = f"{_title_scope(scope)}, layer {contents.layers[place]}"
    rows, keys = label_axes(contents, batch)
    if extra_axis(scope) == "expert":
        if expert is None:
            raise ValueError(f"scope {scope} is told apart by expert: name one of them with expert=")
        assert contents.experts is not None
        chosen = (contents.experts[place, batch] == number_expert(expert)).T[..., None]  # [k, N, 1]
        values, title = (values * chosen).sum(0), f"{title}, expert {expert}"
    elif expert is not None:
        raise ValueError(f"expert={expert} is for scopes told apart by expert; {scope} is summed over experts")
    if extra_axis(scope) == "head":
        if head is None:
            shown = _hide_unseen(drop_padding(values, rows, keys), contents, rows, keys)
            given = {"title": title, "kind": "head", "measure": contents.measure, **options}
            return plot.layer_grid(shown, range(len(shown)), **given)
        if not -values.shape[0] <= integer("head", head) < values.shape[0]:
            raise ValueError(f"scope {scope} has {values.shape[0]} heads; got head={head}: name one of them")
        values, title = values[head], f"{title}, head {head % values.shape[0]}"
    elif head is not None:
        raise ValueError(f"head={head} is for the scope attn_heads; {scope} is summed over heads")
    signed = {"scale": "signed"} if contents.reduce == "toward" else {}
    label = {} if contents.reduce == "l2" else {"colour_label": contents.measure}
    shown = _hide_unseen(drop_padding(values, rows, keys), contents, rows, keys)
    return plot.map_figure(shown, rows.labels, keys.labels, **{"title": title, **signed, **label, **options})


def _title_scope(scope: str) -> str:
    """Returns a scope in words, with its name."""
    words = describe_scope(scope)
    return scope if words == scope else f"{words} ({scope})"


def _hide_unseen(values: Tensor, contents: Contents, rows: Ticks, keys: Ticks) -> Tensor:
    """Returns maps ``[..., n, m]`` with NaN, which is drawn grey, where a causal model's query cannot see the key."""
    if not contents.arguments.get("causal") or contents.key_mask is not None:
        return values
    return values.masked_fill(keys.positions > rows.positions[:, None], torch.nan)


def draw_scopes(contents: Contents, layer: int, batch: int, options: Mapping[str, Any]) -> Figure:
    """Does `Attribution.plot_scopes`."""
    check_one_stack(contents)
    place = layer_place(layer, contents.layers)
    rows, keys = label_axes(contents, batch)
    maps = {
        scope: _hide_unseen(drop_padding(read_map(contents, scope, place, batch), rows, keys), contents, rows, keys)
        for scope in contents.scopes
        if extra_axis(scope) is None
    }
    title = f"layer {contents.layers[place]}"
    return plot.scope_strip(maps, rows.labels, keys.labels, **{"title": title, **options})


def draw_amplification(contents: Contents, batch: int, options: Mapping[str, Any]) -> Figure:
    """Does `Attribution.plot_amplification`."""
    rows, keys = label_axes(contents, batch)
    values = _hide_unseen(drop_padding(ff_amp_maps(contents)[:, batch], rows, keys), contents, rows, keys)
    unmarked = mark_own_tokens(contents, batch, rows, keys)
    given = {"title": "what the feed-forward network amplifies", "unmarked": unmarked, **options}
    return plot.amp_strip(values, contents.layers, rows.labels, keys.labels, **given)


def draw_arcs(
    contents: Contents,
    query: int | str,
    scope: str,
    other: str | None,
    layer: int,
    batch: int,
    options: Mapping[str, Any],
) -> Figure:
    """Does `Attribution.plot_arcs`."""
    check_one_stack(contents)  # with the tokens and layers of one of them, a picture of another would be false
    place = layer_place(layer, contents.layers)
    rows, keys = label_axes(contents, batch)
    at = integer("query", _find_word(query, rows) if isinstance(query, str) else query)
    at += contents.mask.shape[1] if at < 0 else 0
    if at not in rows.positions.tolist():
        raise IndexError(f"query {query} is padding or was not computed; computed: {rows.positions.tolist()}")
    row = rows.positions.tolist().index(at)
    drawn = {}
    for name in (scope, other) if other else (scope,):
        if extra_axis(name):
            raise ValueError(f"scope {name} is told apart by {extra_axis(name)}: arcs are of a scope that is summed")
        drawn[name] = drop_padding(read_map(contents, name, place, batch), rows, keys)[row]
    itself = mark_own_tokens(contents, batch, rows, keys)[row].nonzero().flatten().tolist()
    said = spell_tokens([rows.labels[row]])[0].strip() or rows.labels[row]
    given: dict[str, Any] = {
        "title": f"what “{said}” ({at}) reads in layer {contents.layers[place]}",
        "query_token": None if itself else rows.labels[row],
        "names": tuple(map(_title_scope, drawn)),
    }
    values = list(drawn.values())
    below = values[1] if other else None
    return plot.arcs(values[0], keys.labels, itself[0] if itself else None, other=below, **{**given, **options})


def _find_word(word: str, rows: Ticks) -> int:
    """Returns the position of a query token by what it says, or of the last token of the word that it says.

    Raises ValueError where there is none, or where there are several.
    """
    words = Words.from_tokens(rows.labels, mark_of(rows.labels))
    says = [text.casefold() == word.strip().casefold() for text in words.texts]
    last = {number: place for place, number in enumerate(words.number)}
    found = [int(rows.positions[last[number]]) for number, same in enumerate(says) if same]
    found = found or [int(rows.positions[place]) for place, label in enumerate(rows.labels) if label == word]
    if len(found) != 1:
        where = f"several, at {found}: name a position" if found else f"none; there are {' '.join(words.texts)[:300]!r}"
        raise ValueError(f"query={word!r}, expected the position of a token or a word of the text: {where}")
    return found[0]


def list_for_bertviz(contents: Contents, scope: str, batch: int) -> dict[str, Any]:
    """Does `Attribution.to_bertviz`."""
    rows, keys = label_axes(contents, batch)
    if rows.labels != keys.labels or not torch.equal(rows.positions, keys.positions):
        raise ValueError(
            f"scope {scope} has {len(rows.labels)} rows and {len(keys.labels)} columns of other tokens; bertviz draws "
            "each token on both sides: compute all queries and keys, of one stack"
        )
    layers = []
    for place in range(len(contents.layers)):
        values = drop_padding(read_map(contents, scope, place, batch), rows, keys)
        values = values.reshape(-1, len(rows.labels), len(keys.labels))
        layers.append((values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny))[None])
    return {"attention": layers, "tokens": rows.labels}
