"""Pictures of `Contributions`: which numbers and labels `ffattr.plot` draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import plot
from ...analysis.words import spell_tokens
from ...selection import layer_place
from ..contents import Ticks, drop_padding
from ..kept.policy import Kept
from .contents import FLOW, SignedContents, Text, list_texts, name_boundaries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["describe_number", "draw_flow", "draw_scores", "read_flow"]


def draw_scores(contents: SignedContents, target: int, batch: int, place: int, options: Mapping[str, Any]) -> Figure:
    """Does `Contributions.plot`; ``place`` is that of the boundary at which the text is coloured."""
    texts = list_texts(contents, place)
    drawn = [_make_text(contents, text, target, batch) for text in texts]
    biases = {
        ("bias" if len(texts) == 1 else f"{text.stack} bias"): float(text.bias[target, batch])
        for text in texts
        if len(texts) == 1 or text.bias.any()
    }
    where = "" if texts[-1].boundary == name_boundaries(contents)[0] else f", at {texts[-1].boundary}"
    title = f"what speaks for {describe_number(contents, target, batch)}{where}"
    return plot.score_figure(drawn, biases, float(contents.value[target, batch]), **{"title": title, **options})


def _make_text(contents: SignedContents, text: Text, target: int, batch: int) -> plot.ScoredText:
    ticks = text.label_tokens(batch)
    within = contents.encoder if text.stack == "encoder" else contents
    if text.stack == "encoder" and (within is None or within.names is not text.tokens):
        layers, boundaries = contents.cross_scores, name_boundaries(contents)
    else:
        assert within is not None
        layers, boundaries = within.scores, name_boundaries(within)
    assert layers is not None
    places = ticks.positions.tolist()
    read_at = int(contents.positions[target, batch])
    return plot.ScoredText(
        spell_tokens(ticks.labels),
        ticks.labels,
        text.read_scores(target, batch),
        layers[target, :, batch].detach().cpu()[:, ticks.indices],
        boundaries,
        places.index(read_at) if text.stack != "encoder" and read_at in places else None,
        text.stack,
    )


def describe_number(contents: SignedContents, target: int, batch: int) -> str:
    """Returns the name of a number, and where it is read."""
    name, at = contents.targets[target][batch], int(contents.positions[target, batch])
    return f"“{name}”" if at < 0 else f"“{name}”, read at token {at}"


def draw_flow(
    contents: SignedContents,
    layer: int,
    target: int,
    batch: int,
    head: int | None,
    cross: bool,
    options: Mapping[str, Any],
) -> Figure:
    """Does `Contributions.plot_flow`."""
    place = layer_place(layer, contents.layers)
    values, rows, keys = read_flow(contents, target, place, batch, head, cross)
    name = "" if head is None else f", head {head}"
    title = (
        f"what passes in layer {contents.layers[place]}{name} on its way to {describe_number(contents, target, batch)}"
    )
    given = {"title": title, "scale": "signed", "colour_label": "what passes from key to query", **options}
    return plot.map_figure(values, rows.labels, keys.labels, **given)


def read_flow(
    contents: SignedContents, target: int, place: int, batch: int, head: int | None, cross: bool = False
) -> tuple[Tensor, Ticks, Ticks]:
    """Returns the flow ``[n, m]`` of one layer between real tokens (blocks of them, with keep=Pool), and their names.

    Flow by head is added up where no head is named, with what tokens keep of themselves, which is no head's; ``cross``
    is that from an encoder's tokens. Raises ValueError where there is none, IndexError for a head that is not there.
    """
    kept = contents.cross_kept if cross else contents.kept
    if kept is None:
        what = (
            "of this model there is no flow from an encoder" if cross and contents.cross_scores is None else "no flow"
        )
        raise ValueError(f"{what} was computed: ask ffattr.contributions for flow=True" if what == "no flow" else what)
    if not kept.can_show(FLOW):
        raise ValueError(kept.explain_no_map(FLOW))
    mask = contents.cross_mask if cross else contents.mask
    tokens = contents.cross_tokens if cross else contents.names
    assert mask is not None
    index = target * len(contents.layers) + place
    values = kept.read_map(FLOW, index, batch, mask.shape[1]).detach().cpu().double()
    rows = _label_axis(contents.mask[batch], contents.names, batch, kept)
    keys = _label_axis(mask[batch], tokens, batch, kept)
    if values.dim() == 2:
        if head is not None:
            raise ValueError(f"head={head}: flow was not computed by head; ask ffattr.contributions for flow='heads'")
        return drop_padding(values, rows, keys), rows, keys
    if head is None:
        values = values.sum(0)
        if not cross and contents.residual is not None:
            own = contents.residual[target, place, batch].detach().cpu().double()
            values = values + _spread_own(own, contents.mask[batch].cpu(), kept.block)
    elif not -len(values) <= head < len(values):
        raise IndexError(f"head {head} does not exist: there are {len(values)}")
    else:
        values = values[head]
    return drop_padding(values, rows, keys), rows, keys


def _label_axis(mask: Tensor, tokens: list[list[str]] | None, batch: int, kept: Kept) -> Ticks:
    real = mask.cpu()
    return Ticks.from_positions(torch.arange(len(real)), real, tokens[batch] if tokens else [], kept.block)


def _spread_own(own: Tensor, mask: Tensor, block: int | None) -> Tensor:
    """Returns what tokens keep of themselves ``[T]`` as a map, of blocks as the mean over pairs of their tokens."""
    if block is None:
        return own.diag()
    room = -len(own) % block
    sums, counts = (
        torch.nn.functional.pad(part.double(), (0, room)).unflatten(0, (-1, block)).sum(-1) for part in (own, mask)
    )
    means: Tensor = sums / counts.square().clamp_min(1)
    return means.diag()
