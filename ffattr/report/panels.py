"""What a page shows: the maps of one sequence, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
from torch import Tensor

from .encode import array_of

__all__ = ["Panel", "Scores"]


@dataclass(frozen=True)
class Scores:
    """Holds what the tokens of a panel's columns give to numbers, one for each of its scopes, at ``boundaries``.

    ``read(scope)`` returns ``[boundaries, m]``, with signs. ``rest[scope]`` is what comes from elsewhere by name, a
    number for each boundary, ``values[scope]`` what all of it adds up to. ``read_at[scope]`` is the position of the
    column that the number is read at (-1: none of them). The layers of the panel are those that lie between
    boundaries: one fewer.

        >>> from ffattr.report import Panel, Scores
        >>> given = torch.tensor([[1.0, -0.5], [0.0, 0.5]])
        >>> scores = Scores(["layer 0", "output"], lambda scope: given, {"x": {"bias": [0.0, 0.0]}}, {"x": 0.5})
        >>> panel = Panel("1", ["a", "b"], [0, 1], ["a", "b"], [0, 1], True, [0], ["x"], None, scores=scores)
        >>> [(scope, values.shape) for scope, values in panel.score_maps()]
        [('x', (2, 2))]
    """

    boundaries: Sequence[str]
    read: Callable[[str], Tensor]
    rest: Mapping[str, Mapping[str, Sequence[float]]]
    values: Mapping[str, float]
    read_at: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Holds the maps of one sequence (of one stack of layers, where a model has an encoder and a decoder).

    ``queries`` and ``keys`` are the tokens of the rows and of the columns, with their positions in the text;
    ``same_tokens`` says whether both are positions of one sequence. ``read(scope, place)`` returns the map
    ``[n, m]`` of ``layers[place]``, or ``[parts, n, m]`` where ``parts[scope]`` names what a scope is told apart by
    (``"head 3"``); None: there are no maps, only ``scores``. ``signed`` maps may hold negative entries.
    ``changes`` are ``(layer, component, 1 - rho)``, ``angles`` ``(layer, "own" or "others", median cosine, share below
    zero)`` of the feed-forward network's vector and what bypasses it.

        >>> from ffattr.report import Panel
        >>> values = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
        >>> panel = Panel("1", ["a", "b"], [0, 1], ["a", "b"], [0, 1], True, [0], ["atb"], lambda scope, place: values)
        >>> [(scope, place) for scope, place, _ in panel.maps()]
        [('atb', 0)]
    """

    name: str
    queries: Sequence[str]
    query_positions: Sequence[int]
    keys: Sequence[str]
    key_positions: Sequence[int]
    same_tokens: bool
    layers: Sequence[int]
    scopes: Sequence[str]
    read: Callable[[str, int], Tensor] | None
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    changes: Sequence[tuple[int, str, float]] = ()
    signed: bool = False
    scores: Scores | None = None
    angles: Sequence[tuple[int, str, float, float]] = ()

    def check(self) -> None:
        """Raises ValueError, naming the panel, for what no page can show."""
        for axis, tokens, positions in (
            ("queries", self.queries, self.query_positions),
            ("keys", self.keys, self.key_positions),
        ):
            if not tokens or len(tokens) != len(positions):
                raise ValueError(
                    f"panel {self.name!r} has {len(tokens)} {axis} and {len(positions)} positions of them, expected "
                    "one position for every token, and at least one token"
                )
        for kind, names in (("layers", self.layers), ("scopes", self.scopes)):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"panel {self.name!r} has {kind} {list(names)!r}, expected one or more, each once")
        if self.scores is not None and len(self.scores.boundaries) != len(self.layers) + 1:
            raise ValueError(
                f"panel {self.name!r} has {len(self.scores.boundaries)} boundaries of {len(self.layers)} layers, "
                "expected one more than layers"
            )
        if self.read is None and self.scores is None:
            raise ValueError(f"panel {self.name!r} has neither maps nor scores: there is nothing to show")
        unknown = [scope for scope in self.parts if scope not in self.scopes or not self.parts[scope]]
        if unknown:
            raise ValueError(
                f"panel {self.name!r} has parts of {unknown!r}, expected names of parts of its scopes: "
                f"{', '.join(self.scopes)}"
            )

    @property
    def entries(self) -> int:
        """The number of entries of all maps together, and of scores."""
        maps = sum(len(self.parts.get(scope, " ")) for scope in self.scopes) * len(self.layers) * len(self.queries)
        scores = 0 if self.scores is None else len(self.scores.boundaries) * len(self.scopes)
        return len(self.keys) * (maps * (self.read is not None) + scores)

    def maps(self) -> Iterator[tuple[str, int, list[numpy.ndarray]]]:
        """Yields scope, place of the layer, and the maps ``[n, m]`` of its parts (or of the scope where it has none).

        Raises ValueError, naming panel, scope and layer, for a wrong shape or wrong values.
        """
        if self.read is None:
            return
        for scope in self.scopes:
            parts = self.parts.get(scope)
            expected = [*([len(parts)] if parts else []), len(self.queries), len(self.keys)]
            for place, layer in enumerate(self.layers):
                name = f"the map of {scope}, layer {layer}, of panel {self.name!r}"
                tensor = self.read(scope, place)
                if list(tensor.shape) != expected:
                    raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
                values = array_of(tensor, name, self.signed)
                yield scope, place, list(values) if parts else [values]

    def score_maps(self) -> Iterator[tuple[str, numpy.ndarray]]:
        """Yields every scope with its scores ``[boundaries, m]``, where there are any.

        Raises ValueError or `NonFiniteError`, naming panel and scope, for a wrong shape or wrong values.
        """
        if self.scores is None:
            return
        expected = [len(self.scores.boundaries), len(self.keys)]
        for scope in self.scopes:
            name = f"the scores of {scope!r} of panel {self.name!r}"
            tensor = self.scores.read(scope)
            if list(tensor.shape) != expected:
                raise ValueError(f"{name} have shape {list(tensor.shape)}, expected {expected}")
            yield scope, array_of(tensor, name, signed=True)
