"""What is measured of a batch of pieces: one pass of the model and the engine, and what its rows say of each piece.

Shapes: ``L`` layers, ``B`` pieces, ``T`` tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..analysis import AmplifiedPairs, Categories, ChangeSample, Several, TokenSummary
from ..analysis.categories import categorize_pairs
from ..analysis.category_rates import count_all_pairs
from ..analysis.rows import find_components, find_scopes_around_ff
from ..models.registry import ModelDescription, resolve
from ..pipeline.attribute import attribute
from ..pipeline.contributions import contributions
from ..pipeline.scopes import parse_scopes
from ..results.keep import Dense, Keep, Reduce, Rows, TopK
from ..selection import indices
from .pieces import Parts, Piece, PieceNumbers
from .tables import Layout

if TYPE_CHECKING:
    import pandas

    from ..results import Attribution

__all__ = ["Measure"]

_SAMPLED = 20_000  # pairs of a piece from which its changes are measured: all of up to 141 tokens


class Measure:
    """Measures batches by one model. See `Mapper` for the arguments; ``mark`` tells which tokens begin a word."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        keep: Sequence[str],
        scopes: Sequence[str],
        layers: Any,
        pairs: int,
        nlp: Any,
        mark: str | None,
        target: Any = None,
    ) -> None:
        self.model, self.tokenizer, self.pairs, self.target = model, tokenizer, pairs, target
        self.categories = Categories(nlp, mark=mark)
        description = resolve(model)
        self.layout = Layout.from_keep(
            keep,
            scopes=_name_summed(description, scopes),
            layers=indices("layers", layers, len(description.layers)),
            components=tuple(_find_components([scope.name for scope in description.layers[0].own_scopes])),
            categories=self.categories.names,
        )
        self.layout.check()
        self.scopes = self._list_scopes(description)

    def compute(self, batch: Sequence[Piece]) -> Parts:
        """Runs the model and the engine on a batch. Raises what `ffattr.attribute` raises."""
        layout = self.layout
        changes = ChangeSample(_SAMPLED, keys=[piece.key for piece in batch])
        pairs = AmplifiedPairs(self.pairs, per="sequence")
        sums = {scope: TokenSummary(scope) for scope in layout.scopes} if "tokens" in layout.tables else {}
        feeds = {name: _Feed(policy, layout, batch) for name, policy in self._list_policies()}
        collectors: list[Callable[[Rows], object]] = [*sums.values(), *feeds.values()]
        collectors += [changes] if layout.components else []
        collectors += [pairs] if "pairs" in layout.tables else []
        attribution = attribute(
            self.model,
            [piece.ids for piece in batch],
            tokenizer=self.tokenizer,
            scopes=self.scopes,
            layers=list(layout.layers),
            keep=Reduce(Several(*collectors)),
        )
        of_pieces = _pivot_changes(changes.contextualization_change("sequence"), layout) if layout.components else {}
        found = Parts(list(self._count_pieces(batch, attribution, of_pieces)))
        if "pairs" in layout.tables:
            found.frames["pairs"] = _place(self._name_pairs(pairs, attribution), batch)
        if sums:
            found.frames["tokens"] = _place(_join_sums(sums, attribution), batch)
        if "scores" in layout.tables:
            found.frames["scores"] = _place(self._follow_target(batch), batch)
        for name, feed in feeds.items():
            if name == "maps":
                found.maps = feed.cut_maps()
            else:
                found.frames[name] = feed.cut_rows()
        return found

    def _list_scopes(self, description: ModelDescription) -> list[str]:
        """Lists the scopes that the tables are read off, in the order of the model."""
        own = [scope.name for scope in description.layers[0].own_scopes]
        wanted = {scope for _, *both in _find_components(own) for scope in both}
        if "pairs" in self.layout.tables:
            wanted |= set(find_scopes_around_ff(own))
        if not wanted or self.layout.tables & {"tokens", "top", "maps"}:
            wanted |= set(self.layout.scopes)
        return [scope for scope in own if scope in wanted]

    def _list_policies(self) -> Iterator[tuple[str, Keep]]:
        if self.layout.top is not None:
            yield "top", TopK(self.layout.top)
        if "maps" in self.layout.tables:
            yield "maps", Dense()

    def _count_pieces(
        self, batch: Sequence[Piece], attribution: Attribution, changes: Mapping[str, Any]
    ) -> Iterator[PieceNumbers]:
        errors = attribution.error.amax(0).tolist()
        counted = count_all_pairs(attribution, self.categories)
        for place, piece in enumerate(batch):
            of_piece = {component: values[place] for component, values in changes.items()}
            yield PieceNumbers(piece.row, piece.window, len(piece.ids), errors[place], of_piece, *counted[place])

    def _follow_target(self, batch: Sequence[Piece]) -> pandas.DataFrame:
        """Returns what each token's embedding gives to the target, and what comes from no token (position -1): of a
        document they add up to the model's own number."""
        ids = [piece.ids for piece in batch]
        target = int(self.target) if isinstance(self.target, str) and self.target.isdecimal() else self.target
        frame = contributions(self.model, ids, target=target, tokenizer=self.tokenizer, layers=[0]).to_pandas()
        return frame[frame["boundary"] == 0].rename(columns={"target": "number", "name": "target"})

    def _name_pairs(self, pairs: AmplifiedPairs, attribution: Attribution) -> pandas.DataFrame:
        frame = pairs.frame(attribution, None)
        return frame.assign(**categorize_pairs(frame, attribution, self.categories))


class _Feed:
    """Hands rows to what a policy keeps of them, of the scopes, layers and tokens of one batch."""

    def __init__(self, policy: Keep, layout: Layout, batch: Sequence[Piece]) -> None:
        self.batch, self.scopes, self.layers = batch, layout.scopes, layout.layers
        tokens = max(len(piece.ids) for piece in batch)
        shape = (len(self.layers), len(batch), tokens, tokens)
        shapes = dict.fromkeys(self.scopes, shape)
        self.sink = policy.open(shapes, torch.float32, torch.device("cpu"), self.layers, tuple(range(tokens)))

    def __call__(self, rows: Rows) -> None:
        place = self.layers.index(rows.layer)
        tiles = {scope: rows.maps[scope].cpu() for scope in self.scopes}
        self.sink.add_rows(place, rows.batch, rows.queries.cpu(), rows.keys.cpu(), tiles)

    def cut_maps(self) -> dict[str, Tensor]:
        """Returns the maps of each piece, without padding."""
        maps, found = self.sink.finish().maps, {}
        for place, piece in enumerate(self.batch):
            real = len(piece.ids)
            for scope in self.scopes:
                found[f"{piece.row}.{piece.window}.{scope}"] = maps[scope][:, place, :real, :real].clone()
        return found

    def cut_rows(self) -> pandas.DataFrame:
        """Returns one row for each scope, layer and token with the largest entries of its row of the map."""
        import pandas as pd

        largest, rows = self.sink.finish().largest, []
        for place, piece in enumerate(self.batch):
            for scope in self.scopes:
                top = largest[scope]
                keys, values = top.keys[:, place].numpy(), top.values[:, place].numpy()
                rest, total = top.rest[:, place].numpy(), top.total[:, place].numpy()
                for at, layer in enumerate(self.layers):
                    for position in range(len(piece.ids)):
                        there = keys[at, position] >= 0
                        entries = keys[at, position][there], values[at, position][there]
                        numbers = (rest[at, position], total[at, position])
                        rows.append((piece.row, piece.window, scope, layer, position, *entries, *numbers))
        columns = ["row", "window", "scope", "layer", "position", "keys", "values", "rest", "total"]
        return pd.DataFrame(rows, columns=columns)


def _name_summed(description: ModelDescription, asked: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of scopes. Raises ValueError for unknown ones and for those by head or expert."""
    if "all" in asked:
        return tuple(scope.name for scope in description.layers[0].own_scopes if scope.axis is None)
    found = parse_scopes(list(asked), {"": description.layers})[""]
    apart = next((scope for scope in found if scope.axis is not None), None)
    if apart is not None:
        raise ValueError(
            f"the maps of {apart.name} are told apart by {apart.axis}: a corpus keeps those of other scopes"
        )
    return tuple(scope.name for scope in found)


def _find_components(scopes: Sequence[str]) -> list[tuple[str, str, str]]:
    try:
        return find_components(scopes)
    except ValueError:
        return []


def _pivot_changes(frame: pandas.DataFrame, layout: Layout) -> dict[str, Any]:
    """Returns by component the changes ``[B, L]``; NaN where there is none."""
    places = {layer: at for at, layer in enumerate(layout.layers)}
    sizes = (int(frame["batch"].max()) + 1, len(places))
    found = {component: np.full(sizes, np.nan, dtype=np.float32) for component, *_ in layout.components}
    for component, values in found.items():
        of = frame[frame["component"] == component]
        values[of["batch"].to_numpy(), of["layer"].map(places).to_numpy()] = of["value"].to_numpy()
    return found


def _join_sums(sums: Mapping[str, TokenSummary], attribution: Attribution) -> pandas.DataFrame:
    import pandas as pd

    frames = [summary.frame(attribution).assign(scope=scope) for scope, summary in sums.items()]
    return pd.concat(frames, ignore_index=True)


def _place(frame: pandas.DataFrame, batch: Sequence[Piece]) -> pandas.DataFrame:
    """Puts the row and the window of each piece in the place of its number in the batch."""
    at = frame["batch"].to_numpy()
    rows, windows = (np.array([getattr(piece, name) for piece in batch]) for name in ("row", "window"))
    return frame.assign(row=rows[at], window=windows[at]).drop(columns="batch")
