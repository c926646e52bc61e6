"""`Contributions` as HTML: a page to look around in, and the coloured text that a notebook shows.

Shapes: ``M`` boundaries, ``n`` and ``m`` real tokens of rows and columns (blocks of them, with keep=Pool), ``H`` heads.
"""

from __future__ import annotations

import html
from collections.abc import Iterator

import torch
from torch import Tensor

from ...analysis.words import spell_tokens
from ...report import Panel, Scores, render
from ..contents import Ticks, describe_model
from ..kept.policy import Kept
from ..pages import join_tokens
from .contents import FLOW, SignedContents, label_tokens, list_texts, name_boundaries, name_own
from .figures import describe_number, read_flow

__all__ = ["make_panels", "render_page", "render_summary"]

_NAMED = 40  # characters of a text by which a sequence is told from others
_SHOWN = 300  # tokens of a text that fits a notebook
_NUMBERS = 3  # numbers that do


def render_page(contents: SignedContents, title: str | None, limit: int) -> Iterator[str]:
    """Does `Contributions.to_html`: yields the pieces of a page."""
    asked = contents.arguments
    shown = make_panels(contents)
    facts = {
        "model": describe_model(asked),
        "Integrated Gradients": f"{asked.get('ig', '')}, baseline {asked.get('baseline', '')}",
        "flow": "" if contents.kept is None else str(contents.scope),
        "kept": ""
        if contents.kept is None or asked.get("keep", "dense") in ("dense", "Dense(dtype=None, path=None)")
        else str(asked["keep"]),
        "largest error": f"{float(contents.error.max()):.1e}" if contents.error.numel() else "",
        "ffattr": str(asked.get("ffattr", "")),
    }
    text = title or " · ".join(part for part in (facts["model"], shown[0].name if shown else "") if part)
    return render(shown, text, facts={name: value for name, value in facts.items() if value}, limit=limit)


def make_panels(contents: SignedContents) -> list[Panel]:
    """Makes a panel of every sequence and stack of layers; those without a real token are left out."""
    found = []
    for batch in range(len(contents.mask)):
        bias = contents.bias[:, :, batch]
        if contents.cross_scores is None or contents.cross_mask is None:
            found.append(_make_panel(contents, batch, "", contents, {"bias": bias}))
            continue
        own, across = contents.scores[:, :, batch].sum(-1), contents.cross_scores[:, :, batch].sum(-1)
        if contents.encoder is not None:
            rest = {"bias": contents.encoder.bias[:, :, batch]}
            found.append(_make_panel(contents, batch, "encoder", contents.encoder, rest))
        found.append(_make_panel(contents, batch, name_own(contents), contents, {"bias": bias, "encoder": across}))
        found.append(_make_panel(contents, batch, "cross", contents, {"bias": bias, "decoder": own}))
    return [panel for panel in found if panel is not None]


def _make_panel(
    contents: SignedContents, batch: int, stack: str, of: SignedContents, rest: dict[str, Tensor]
) -> Panel | None:
    """Makes the panel of one sequence, of the layers and numbers of ``of``; ``rest`` ``[K, M]`` is not its tokens'."""
    cross = stack == "cross"
    kept, scores = (of.cross_kept, of.cross_scores) if cross else (of.kept, of.scores)
    kept = kept if kept is not None and kept.can_show(FLOW) else None
    mask, tokens = (of.cross_mask, of.cross_tokens) if cross else (of.mask, of.names)
    assert scores is not None
    assert mask is not None
    keys = _label_axis(mask[batch], tokens, batch, kept)
    rows = _label_axis(of.mask[batch], of.names, batch, kept) if cross else keys
    if not keys.labels or not rows.labels:
        return None
    names = _name_numbers(contents, batch)
    numbers = {name: place for place, name in enumerate(names)}
    real = label_tokens(mask[batch], [])

    def read_scores(scope: str) -> Tensor:
        values = scores[numbers[scope], :, batch].detach().cpu().double()
        return _add_blocks(values, kept)[:, keys.indices]

    def read_values(scope: str, place: int) -> Tensor:
        heads = _count_heads(kept, batch, of)
        parts = [read_flow(of, numbers[scope], place, batch, head, cross)[0] for head in (None, *range(heads))]
        return torch.stack(parts) if heads else parts[0]

    words = join_tokens(label_tokens(of.mask[batch], of.names[batch] if of.names else []).labels)
    name = f"{batch + 1}: {words if len(words) <= _NAMED else words[: _NAMED - 1] + '…'}"
    heads = _count_heads(kept, batch, of)
    read_at = contents.positions[:, batch].tolist() if of is contents and not cross else [-1] * len(names)
    return (
        Panel(
            name=f"{stack}, {name}" if stack else name,
            queries=rows.labels,
            query_positions=rows.positions.tolist(),
            keys=keys.labels,
            key_positions=keys.positions.tolist(),
            same_tokens=not cross,
            layers=of.layers,
            scopes=names,
            read=None if kept is None else read_values,
            parts={one: ["sum", *(f"head {head}" for head in range(heads))] for one in names} if heads else {},
            signed=True,
            scores=Scores(
                boundaries=name_boundaries(of),
                read=read_scores,
                rest={one: {what: part[k].tolist() for what, part in rest.items()} for one, k in numbers.items()},
                values={one: float(of.value[k, batch]) for one, k in numbers.items()},
                read_at={one: _find_column(keys, read_at[k], kept) for one, k in numbers.items()},
            ),
        )
        if len(real.labels)
        else None
    )


def _label_axis(mask: Tensor, tokens: list[list[str]] | None, batch: int, kept: Kept | None) -> Ticks:
    real = mask.cpu()
    block = None if kept is None else kept.block
    return Ticks.from_positions(torch.arange(len(real)), real, tokens[batch] if tokens else [], block)


def _add_blocks(values: Tensor, kept: Kept | None) -> Tensor:
    """Returns scores ``[M, T]``, of blocks of tokens where flow was kept of such."""
    if kept is None or kept.block is None:
        return values
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % kept.block))
    sums: Tensor = padded.unflatten(1, (-1, kept.block)).sum(-1)
    return sums


def _find_column(keys: Ticks, position: int, kept: Kept | None) -> int:
    """Returns the position by which a page knows the column of a token: its own, or that of its block's first."""
    block = 1 if kept is None or kept.block is None else kept.block
    found = [at for at in keys.positions.tolist() if at // block == position // block]
    return found[0] if position >= 0 and found else -1


def _count_heads(kept: Kept | None, batch: int, of: SignedContents) -> int:
    """Returns how many heads flow is told apart by, 0: it is not."""
    if kept is None or not of.layers:
        return 0
    mask = of.cross_mask if of.cross_kept is kept and of.cross_mask is not None else of.mask
    found = kept.read_map(FLOW, 0, batch, mask.shape[1])
    return len(found) if found.dim() == 3 else 0


def _name_numbers(contents: SignedContents, batch: int) -> list[str]:
    """Returns what each number of a sequence is called; where names recur, with the position, or with its number."""
    names = [of_target[batch] for of_target in contents.targets]
    for places in (contents.positions[:, batch].tolist(), range(len(names))):
        told = [f"{name} at {at}" if names.count(name) > 1 else name for name, at in zip(names, places, strict=True)]
        if len(set(told)) == len(told):
            return told
    return [f"{number}: {name}" for number, name in enumerate(names)]


def render_summary(contents: SignedContents, line: str) -> str:
    """Returns what a notebook shows: ``line``, and the text of the first sequence in the colours of its scores.

    It has no script and makes no request; every token is escaped.
    """
    text = f"<div><code>{html.escape(line)}</code>"
    if not len(contents.mask) or not len(contents.targets):
        return text + "</div>"
    texts = list_texts(contents, 0)
    for target in range(min(len(contents.targets), _NUMBERS)):
        value = float(contents.value[target, 0])
        text += f'<p style="{_LINE}"><b>{html.escape(describe_number(contents, target, 0))}</b>: {value:.4g}</p>'
        sizes = [float(one.read_scores(target, 0).abs().max()) for one in texts if one.mask[0].any()]
        most = max(sizes, default=0.0) or 1.0
        for one in texts:
            ticks = one.label_tokens(0)
            pieces = zip(spell_tokens(ticks.labels), one.read_scores(target, 0).tolist(), strict=True)
            spans = "".join(_render_token(piece, score, most) for piece, score in list(pieces)[:_SHOWN])
            name = f"<i>{html.escape(one.stack)}</i> " if one.stack else ""
            cut = " …" if len(ticks.labels) > _SHOWN else ""
            bias = float(one.bias[target, 0])
            text += f'<p style="{_LINE}line-height:1.9">{name}{spans}{cut} <small>bias {bias:+.3g}</small></p>'
    more = len(contents.targets) - _NUMBERS
    note = f", {more} more numbers" if more > 0 else ""
    return f'{text}<p style="{_LINE}"><small>blue speaks for the number, orange against it{note}</small></p></div>'


_LINE = "margin:.3em 0;font-family:system-ui,sans-serif;"


def _render_token(piece: str, score: float, most: float) -> str:
    bare = piece.lstrip()
    space = html.escape(piece[: len(piece) - len(bare)]).replace("\n", "<br>")
    colour = "70,145,205" if score >= 0 else "224,138,60"  # seen on white as on black
    shown = html.escape(bare) or "&#183;"
    return (
        f'{space}<span title="{score:+.4g}" style="background:rgba({colour},{min(abs(score) / most, 1.0):.2f});'
        f'border-radius:3px;padding:1px 2px">{shown}</span>'
    )
