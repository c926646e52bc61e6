"""An `Attribution` as HTML: a page to look around in, and the few lines that a notebook shows.

Shapes: ``N`` query tokens, ``C`` columns.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..analysis.alignment import list_angles
from ..analysis.change import list_changes
from ..analysis.words import Words, mark_of
from ..report import Panel, render
from .contents import Contents, describe_model, drop_padding, label_axes, read_map
from .scope_names import extra_axis

__all__ = ["join_tokens", "make_panels", "render_page", "render_summary"]

_NAMED = 40  # characters of a text by which a sequence is told from others
_SHOWN = 24  # tokens of a map that fits a notebook


def render_page(contents: Contents, shown: Sequence[Panel], title: str | None, limit: int) -> Iterator[str]:
    """Yields the pieces of a report of ``shown``, which are panels of ``contents``.

    Raises ValueError for what cannot be shown, or not within ``limit`` bytes.
    """
    asked = contents.arguments
    facts = {
        "model": describe_model(asked),
        "Integrated Gradients": f"{asked.get('ig', '')}, baseline {asked.get('baseline', '')}",
        "kept": "" if asked.get("keep", "dense") == "dense" else str(asked["keep"]),
        "median error of the sketch": _sketch_error(contents),
        "largest layer error": f"{float(contents.error.max()):.1e}" if contents.error.numel() else "",
        "ffattr": str(asked.get("ffattr", "")),
    }
    text = title or " · ".join(part for part in (facts["model"], shown[0].name if shown else "") if part)
    given = {name: value for name, value in facts.items() if value}
    return render(shown, text, facts=given, measure=contents.measure, limit=limit)


def _sketch_error(contents: Contents) -> str:
    """Returns the largest of all maps as text; of exact ones nothing."""
    errors = [float(errors.max()) for errors in contents.sketch_error.values() if errors.numel()]
    return f"at most {max(errors):.2%}" if errors else ""


def make_panels(contents: Contents, scopes: Sequence[str], stack: str = "") -> list[Panel]:
    """Makes a panel of every sequence; those without a real token or column are left out."""
    found = []
    for batch in range(len(contents.mask)):
        rows, keys = label_axes(contents, batch)
        if not len(rows.labels) or not len(keys.labels):
            continue

        def read_values(scope: str, place: int, batch: int = batch, rows: Any = rows, keys: Any = keys) -> Tensor:
            values = read_map(contents, scope, place, batch).detach().cpu()
            if extra_axis(scope) == "expert":  # by its place among a token's experts; on a page, all of them together
                values = values.sum(0)
            return drop_padding(values, rows, keys)

        words = join_tokens(rows.labels)
        name = f"{batch + 1}: {words if len(words) <= _NAMED else words[: _NAMED - 1] + '…'}"
        by_head = (scope for scope in scopes if extra_axis(scope) == "head" and contents.layers)
        parts = {s: [f"head {h}" for h in range(len(read_map(contents, s, 0, batch)))] for s in by_head}
        found.append(
            Panel(
                name=f"{stack}, {name}" if stack else name,
                queries=rows.labels,
                query_positions=rows.positions.tolist(),
                keys=keys.labels,
                key_positions=keys.positions.tolist(),
                same_tokens=contents.key_tokens is None,
                layers=contents.layers,
                scopes=scopes,
                read=read_values,
                parts=parts,
                changes=_list_changes(contents, batch),
                angles=_list_angles(contents, batch),
            )
        )
    return found


def join_tokens(tokens: Sequence[str]) -> str:
    """Returns the text of tokens, by which a reader tells sequences apart; of blocks, their names."""
    words = Words.from_tokens(tokens, mark_of(tokens))
    special = {number for number, apart in zip(words.number, words.special, strict=True) if apart}
    symbols = {number for number, symbol in zip(words.number, words.symbols, strict=True) if symbol}
    texts = [(number, text) for number, text in enumerate(words.texts) if number not in special]
    return "".join(text if number in symbols else f" {text}" for number, text in texts).strip() or " ".join(tokens)


def _list_changes(contents: Contents, batch: int) -> list[tuple[int, str, float]]:
    """Lists layer, component and contextualization change of one sequence; none where its maps do not tell."""
    try:
        one_sequence = _OneSequence(contents, batch)
        rows = list_changes(one_sequence)
    except ValueError:  # scopes without neighbours, or maps that were not kept whole
        return []
    return [(layer, component, value) for layer, component, _, _, value, *_ in rows if value == value]


def _list_angles(contents: Contents, batch: int) -> list[tuple[int, str, float, float]]:
    """Lists layer, kind of pairs, median cosine of what the network writes and what bypasses it, and the share of pairs
    below zero, of one sequence; none where its maps do not tell."""
    if contents.key_mask is not None:  # columns that are no query's own
        return []
    try:
        return list_angles(_OneSequence(contents, batch))
    except ValueError:  # scopes without the three that tell, or maps that were not kept whole
        return []


class _OneSequence:
    """One sequence of an attribution, as `contextualization_change` reads it."""

    def __init__(self, contents: Contents, batch: int) -> None:
        only = slice(batch, batch + 1)
        self.maps = {scope: maps[:, only] for scope, maps in contents.maps.items()}
        self.layers, self.queries, self.scopes = contents.layers, contents.queries, contents.scopes
        self.mask = contents.mask[only]
        self.key_mask = None if contents.key_mask is None else contents.key_mask[only]
        self.tokens = contents.tokens[only]
        self.key_tokens = None if contents.key_tokens is None else contents.key_tokens[only]
        self.arguments = contents.arguments


def render_summary(contents: Contents, line: str) -> str:
    """Returns what a notebook shows: ``line``, and the last map of the first sequence, cut to its first tokens.

    It has no script and makes no request; every token is escaped.
    """
    text = f"<div><code>{html.escape(line)}</code>"
    if not contents.layers or not len(contents.mask) or not contents.kept.can_show(contents.scopes[-1]):
        return text + "</div>"
    scope = contents.scopes[-1]
    rows, keys = label_axes(contents, 0)
    values = read_map(contents, scope, len(contents.layers) - 1, 0).detach().cpu()
    while values.dim() > 2:
        values = values.sum(0)
    values = drop_padding(values, rows, keys).double()[:_SHOWN, :_SHOWN]
    if not values.numel():
        return text + "</div>"
    shares = values / values.sum(1, keepdim=True).clamp_min(1e-300)
    cut = values.shape != (len(rows.labels), len(keys.labels))
    head = "".join(f'<th style="{_TURNED}">{_shorten_token(token)}</th>' for token in keys.labels[:_SHOWN])
    body = "".join(
        f'<tr><th style="{_CELL}text-align:right">{_shorten_token(token)}</th>'
        + "".join(_render_cell(float(norm), float(share)) for norm, share in zip(*both, strict=True))
        + "</tr>"
        for token, *both in zip(rows.labels, values, shares, strict=False)
    )
    caption = f"{scope}, layer {contents.layers[-1]}, first sequence{f', first {_SHOWN} tokens' if cut else ''}"
    return (
        f'{text}<table style="border-collapse:collapse;margin:.5em 0"><caption style="{_CELL}text-align:left">'
        f"{html.escape(caption)}: rows read, columns are read; colour is a row's share</caption>"
        f"<tr><th></th>{head}</tr>{body}</table></div>"
    )


_CELL = "font:11px system-ui,sans-serif;padding:1px 4px;white-space:nowrap;"
_TURNED = f"{_CELL}writing-mode:vertical-rl;transform:rotate(180deg);text-align:left"


def _render_cell(norm: float, share: float) -> str:
    colour = f"rgba(31,119,180,{share**0.5:.2f})"  # seen on white as on black
    return f'<td title="{norm:.3g} ({share:.1%})" style="background:{colour};min-width:14px"></td>'


def _shorten_token(token: str) -> str:
    return html.escape(token if len(token) <= 16 else token[:15] + "…")
