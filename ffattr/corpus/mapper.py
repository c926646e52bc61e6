"""`Mapper`: from documents to rows of tables, batch after batch. It knows nothing of files.

Shapes: ``L`` layers, ``T`` tokens of a piece.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..analysis.words import mark_of
from ..errors import UnsupportedModel
from ..models import pretrained
from ..models.registry import resolve
from .documents import Document, Failure
from .measure import Measure
from .pieces import Parts, Piece, join_parts
from .tables import Layout, make_tables, nest_rows

__all__ = ["Mapper", "TokenLimit"]

_BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
"""Padded tokens of a batch. More make nothing faster: a CPU is busy with eight short documents."""


@dataclass(frozen=True)
class TokenLimit:
    """Says how many tokens a piece has at most (None: any number), and what becomes of a longer document: ``"error"``,
    ``"cut"`` (its beginning alone) or ``"window"`` (one piece after the other)."""

    tokens: int | None
    long: str = "error"

    def __post_init__(self) -> None:
        if self.long not in ("error", "cut", "window"):
            raise ValueError(f"long={self.long!r}, expected 'error', 'cut' or 'window'")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"max_tokens={self.tokens}, expected at least 1")


class Mapper:
    """Measures documents in batches, and never raises for one of them: it becomes a row that says why.

    model: a name or folder, or a loaded model with its ``tokenizer``. keep: which tables (``"documents"`` is always
    there): ``"pairs"``, ``"tokens"``, ``"top:K"``, ``"maps"`` and, of a model with a head, ``"scores"``: what each
    token gives to ``target``, as `ffattr.contributions` takes it. scopes: those of ``tokens``, ``top`` and ``maps``.
    layers: numbers or a slice (None: all). pairs: how many of each layer and document. long, max_tokens: see
    `TokenLimit`; the model's own limit holds besides. batch_tokens: padded tokens of a batch (None: what keeps the
    device busy). nlp: a spaCy pipeline for grammatical categories. text, id: names of columns of the batches.

    Calling it maps a batch of columns to columns, one row for each document, in which the rows of other tables are
    lists: the form that ``ray.data.Dataset.map_batches``, ``datasets.Dataset.map(batched=True)`` and Daft take. Of a
    table of pyarrow it makes one, whose columns have the same types in every batch, whatever becomes of its documents.

    >>> mapper = ffattr.corpus.Mapper(model, tokenizer, pairs=2)
    >>> found = mapper({"text": ["The cat sat.", "", "Dogs bark."]})
    >>> [row["layer"] for row in found["pairs"][0]], found["error_type"]
    ([0, 0, 1, 1, 2, 2], [None, 'EmptyText', None])
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        keep: Sequence[str] = ("documents", "pairs", "tokens"),
        scopes: Sequence[str] = ("layer",),
        layers: Any = None,
        pairs: int = 10,
        target: Any = None,
        long: str = "error",
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        nlp: Any = None,
        text: str = "text",
        id: str | None = None,  # noqa: A002
    ) -> None:
        if isinstance(model, str):
            model, tokenizer = pretrained.load(model) if target is None else pretrained.load_predictor(model)
        if not callable(tokenizer):
            raise TypeError(f"tokenizer is {tokenizer!r}, expected the model's, or a model by its name")
        self.tokenizer, self.text, self.id = tokenizer, text, id
        description = resolve(model)
        if description.stacks:
            raise UnsupportedModel("the model has an encoder and a decoder: a corpus is read by models of one stack")
        limits = [limit for limit in (description.max_positions, max_tokens) if limit is not None]
        self.limit = TokenLimit(min(limits, default=None), long)
        if long == "window" and not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"long='window' needs a fast tokenizer, which {type(tokenizer).__name__} is not")
        device = next(description.base.parameters()).device.type
        self.batch_tokens = batch_tokens or _BATCH_TOKENS.get(device, _BATCH_TOKENS["cuda"])
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ()
        self.measure = Measure(
            model, tokenizer, keep, scopes, layers, pairs, nlp, mark_of(map(str, vocabulary)), target
        )

    @property
    def layout(self) -> Layout:
        return self.measure.layout

    def check(self) -> None:
        """Computes a batch of two short sequences. Raises what a model, a backend or an option is to blame for."""
        ids = self.tokenizer("a b c d")["input_ids"][:8]
        self.measure.compute([Piece(0, 0, ids, 0), Piece(1, 0, ids[: max(1, len(ids) - 1)], 1)])

    def __call__(self, batch: Any) -> Any:
        """Returns columns of Python values, one for each document of ``batch``, or a table of pyarrow for one."""
        as_table = isinstance(batch, pa.Table)
        texts = _list_column(batch[self.text])
        ids = [None] * len(texts) if self.id is None else [str(one) for one in _list_column(batch[self.id])]
        documents = [
            Document(row, text if isinstance(text, str) else Failure("NotText", f"a {type(text).__name__}"), one)
            for row, (text, one) in enumerate(zip(texts, ids, strict=True))
        ]
        pieces, failures = [], {}
        for document in documents:
            found = self.encode(document)
            if isinstance(found, Failure):
                failures[document.row] = found
            else:
                pieces += found
        parts = []
        for together in self.cut_batches(pieces):
            computed, failed = self.compute(together)
            parts += computed
            failures |= failed
        columns = nest_rows(make_tables(self.layout, documents, failures, join_parts(parts)))
        return pa.table(columns, self.layout.nested_schema) if as_table else columns

    def encode(self, document: Document, source: str = "") -> list[Piece] | Failure:
        """Tokenises a document of ``source``, or says why there is nothing to compute."""
        if isinstance(document.text, Failure):
            return document.text
        if not document.text.strip():
            return Failure("EmptyText", "the text is empty")
        try:
            windows = self._tokenize(document.text)
        except Exception as error:
            return Failure.from_error(error)
        if isinstance(windows, Failure):
            return windows
        return [
            Piece(document.row, window, ids, _key_of(source, document.row, window))
            for window, ids in enumerate(windows)
        ]

    def cut_batches(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Cuts pieces into batches of about the same length: a function of these pieces alone, the longest first."""
        batches: list[list[Piece]] = []
        for piece in sorted(pieces, key=lambda piece: (-len(piece.ids), piece.row, piece.window)):
            if batches and len(batches[-1][0].ids) * (len(batches[-1]) + 1) <= self.batch_tokens:
                batches[-1].append(piece)
            else:
                batches.append([piece])
        return batches

    def compute(self, batch: Sequence[Piece]) -> tuple[list[Parts], dict[int, Failure]]:
        """Measures a batch; one that raises in halves, down to the document that is to blame.

        Raises OSError where a disk is full, which no document is to blame for.
        """
        try:
            return [self.measure.compute(batch)], {}
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if len(batch) == 1:
                return [], {batch[0].row: Failure.from_error(error)}
        middle = len(batch) // 2
        (first, of_first), (second, of_second) = self.compute(batch[:middle]), self.compute(batch[middle:])
        return first + second, of_first | of_second

    def _tokenize(self, text: str) -> list[list[int]] | Failure:
        """Returns the ids of each window."""
        ids = list(self.tokenizer(text)["input_ids"])
        most = self.limit.tokens
        if not ids:
            return Failure("EmptyText", f"the text {text[:40]!r} has no tokens")
        if most is None or len(ids) <= most:
            return [ids]
        if self.limit.long == "error":
            return Failure("TooLong", f"{len(ids)} tokens, expected at most {most}")
        cut = self.tokenizer(
            text, truncation=True, max_length=most, return_overflowing_tokens=self.limit.long == "window"
        )["input_ids"]
        return [list(window) for window in cut] if self.limit.long == "window" else [list(cut)]


def _list_column(column: Any) -> list[Any]:
    """Returns the values of a column: those of pyarrow's are no Python values."""
    return column.to_pylist() if isinstance(column, pa.ChunkedArray) else list(column)


def _key_of(source: str, row: int, window: int) -> int:
    digest = hashlib.blake2b(f"{source}\0{row}\0{window}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
