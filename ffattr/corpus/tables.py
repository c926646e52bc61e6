"""The tables of a corpus: which columns each has, how rows are arranged, and how they are written to the disk.

A table is a folder of Parquet files, a part for each shard, a thousand parts in each folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .documents import Document, Failure

if TYPE_CHECKING:
    from .pieces import Parts, PieceNumbers

__all__ = [
    "COMMIT",
    "Layout",
    "choose_encodings",
    "list_parts",
    "make_tables",
    "name_change",
    "nest_rows",
    "part_path",
    "write_table",
]

COMMIT = "documents"
"""The table that is written last: a shard is done where its part is there."""

_CARRIED = b"ffattr"  # the name of the metadata
_NAMES = ("pairs", "tokens", "maps", "scores")
_PER_FOLDER = 1000
_OF_FILES = ("source", "row", "shard")  # columns that say where a document lies
_AT = [("source", pa.string()), ("row", pa.int64()), ("window", pa.int32())]
_TOKENS = [
    *(("scope", pa.string()), ("layer", pa.int32()), ("position", pa.int32()), ("token", pa.string())),
    *((name, pa.float32()) for name in ("norm", "own", "gives")),
]
_PAIRS = [
    *((name, pa.int32()) for name in ("layer", "rank", "query", "key")),
    *((name, pa.string()) for name in ("query_token", "key_token")),
    *((name, pa.float32()) for name in ("before", "after", "amplification")),
]
_SCORES = [("target", pa.string()), ("position", pa.int32()), ("token", pa.string()), ("score", pa.float32())]
_TOP = [
    *(("scope", pa.string()), ("layer", pa.int32()), ("position", pa.int32())),
    *(("keys", pa.list_(pa.int32())), ("values", pa.list_(pa.float32()))),
    *((name, pa.float32()) for name in ("rest", "total")),
]


@dataclass(frozen=True)
class Layout:
    """Which ``tables`` there are, and what their columns depend on: the ``top`` entries of a row, the scopes and layers
    that are measured, the components of the feed-forward block, each with the scopes before and after it, and the
    categories of pairs. The schema of ``documents`` carries it."""

    tables: frozenset[str]
    top: int | None
    scopes: tuple[str, ...]
    layers: tuple[int, ...]
    components: tuple[tuple[str, str, str], ...]
    categories: tuple[str, ...]

    @classmethod
    def from_keep(cls, keep: Sequence[str], **others: Any) -> Layout:
        """Reads ``keep``, names of tables and ``"top:K"``. Raises ValueError for an unknown one."""
        tables, top = {COMMIT}, None
        for name in keep:
            kind, colon, count = name.partition(":")
            if kind == "top" and colon and count.isdecimal() and int(count) > 0:
                top = int(count)
            elif name not in (COMMIT, *_NAMES):
                raise ValueError(f"unknown table {name!r}, expected some of {COMMIT}, {', '.join(_NAMES)}, top:K")
            tables.add(kind)
        return cls(frozenset(tables), top, **others)

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> Layout:
        """Reads what the schema of ``documents`` carries."""
        found: dict[str, Any] = json.loads(schema.metadata[_CARRIED])
        components = tuple(tuple(component) for component in found.pop("components"))
        tables = frozenset(found.pop("tables"))
        found |= {name: tuple(found[name]) for name in ("scopes", "layers", "categories")}
        return cls(tables, components=components, **found)

    def check(self) -> None:
        """Raises ValueError for layers that are named twice."""
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers are {list(self.layers)}, expected one or more, each once")

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        """The columns of every table but ``maps``, which is none."""
        documents = [
            *(("source", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("shard", pa.int32())),
            *(("tokens", pa.int32()), ("windows", pa.int32()), ("error_type", pa.string()), ("error", pa.string())),
            *(
                ("model_error", pa.float32()),
                *((name_change(one), pa.list_(pa.float32())) for one, *_ in self.components),
            ),
            *(("all_pairs", pa.int64()), *((f"all_{name}", pa.int64()) for name in self.categories)),
        ]
        pairs = [*_AT, *_PAIRS, *((name, pa.bool_()) for name in self.categories)]
        found = {COMMIT: documents, "pairs": pairs, "tokens": [*_AT, *_TOKENS], "top": [*_AT, *_TOP]}
        found["scores"] = [*_AT, *_SCORES]
        schemas = {name: pa.schema(columns) for name, columns in found.items() if name in self.tables}
        carried = json.dumps(asdict(self) | {"tables": sorted(self.tables)}, sort_keys=True)
        return schemas | {COMMIT: schemas[COMMIT].with_metadata({_CARRIED: carried})}

    @property
    def nested_schema(self) -> pa.Schema:
        """The columns of `nest_rows`."""
        schemas = self.schemas
        columns = [
            field.with_name(_name_nested(field.name)) for field in schemas[COMMIT] if field.name not in _OF_FILES
        ]
        for name, schema in schemas.items():
            if name != COMMIT:
                columns.append(
                    pa.field(name, pa.list_(pa.struct([one for one in schema if one.name not in _OF_FILES])))
                )
        return pa.schema(columns)


def name_change(component: str) -> str:
    """Returns the column of a component's changes, ``change_ff`` of ``FF``."""
    return "change_" + component.lower().replace(" ", "_")


def make_tables(
    layout: Layout,
    documents: Sequence[Document],
    failures: Mapping[int, Failure],
    parts: Parts,
    source: str = "",
    shard: int = 0,
) -> dict[str, pa.Table]:
    """Returns the tables, with the rows of ``documents`` in their order; of those that failed only in ``documents``."""
    schemas = layout.schemas
    by_row: dict[int, list[PieceNumbers]] = {}
    for piece in parts.pieces:
        by_row.setdefault(piece.row, []).append(piece)
    rows = []
    for document in documents:
        row: dict[str, Any] = {"source": source, "row": document.row, "id": document.id, "shard": shard}
        failure = failures.get(document.row)
        if failure is None:
            row |= _join_windows(layout, by_row[document.row])
        else:
            row |= {"error_type": failure.kind, "error": _storable(failure.message)}
        rows.append(row)
    tables = {COMMIT: pa.Table.from_pylist(rows, schema=schemas[COMMIT])}
    for name, schema in schemas.items():
        if name == COMMIT:
            continue
        frame = parts.frames.get(name)
        if frame is None:
            tables[name] = schema.empty_table()
            continue
        kept = frame[~frame["row"].isin(list(failures))].assign(source=source)
        tables[name] = pa.Table.from_pandas(kept[schema.names], schema, preserve_index=False).replace_schema_metadata()
    return tables


def nest_rows(tables: Mapping[str, pa.Table]) -> dict[str, list[Any]]:
    """Returns the columns of ``documents``, and for each other table a column with a list of rows for each document.

    As ``tokens`` is a table, the number of a document's tokens is called ``token_count``.
    """
    documents = tables[COMMIT].drop_columns(["source", "shard"])
    found: dict[str, list[Any]] = {
        _name_nested(name): documents.column(name).to_pylist() for name in documents.column_names
    }
    for name, table in tables.items():
        if name == COMMIT:
            continue
        of_row: dict[int, list[Any]] = {row: [] for row in found["row"]}
        for row in table.drop_columns(["source"]).to_pylist():
            of_row[row.pop("row")].append(row)
        found[name] = list(of_row.values())
    del found["row"]
    return found


def _name_nested(column: str) -> str:
    return "token_count" if column == "tokens" else column


def part_path(folder: Path, table: str, shard: int) -> Path:
    """Returns the place of a shard's part of a table."""
    ending = "safetensors" if table == "maps" else "parquet"
    return folder / table / f"{shard // _PER_FOLDER:03d}" / f"part-{shard:06d}.{ending}"


def list_parts(folder: Path, table: str) -> list[Path]:
    """Lists the parts of a table that there are, in the order of shards."""
    return sorted((folder / table).glob("*/part-*.parquet"), key=lambda path: int(path.stem.removeprefix("part-")))


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table as Parquet."""
    pq.write_table(table, path, **choose_encodings(table.schema))


def choose_encodings(schema: pa.Schema) -> dict[str, Any]:
    """Returns how columns are written: zstd, dictionaries of texts, floats split into bytes."""
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    floats = [_name_leaf(field) for field in schema if _is_float(field.type)]
    return {"compression": "zstd", "use_dictionary": texts, "use_byte_stream_split": floats}


def _join_windows(layout: Layout, pieces: Sequence[PieceNumbers]) -> dict[str, Any]:
    """Returns what is said of a document: its changes are means over its windows, its counts are sums."""
    row: dict[str, Any] = {
        "tokens": sum(piece.tokens for piece in pieces),
        "windows": len(pieces),
        "model_error": float(np.max([piece.model_error for piece in pieces])),  # NaN counts as largest
        "all_pairs": sum(piece.all_pairs for piece in pieces),
    }
    for component, *_ in layout.components:
        row[name_change(component)] = _average_changes([piece.changes[component] for piece in pieces])
    for category in layout.categories:
        row[f"all_{category}"] = sum(piece.counts[category] for piece in pieces)
    return row


def _average_changes(changes: Sequence[Any]) -> list[float]:
    """Returns the means ``[L]`` of changes ``[L]``, of those that are defined; NaN where none is."""
    if len(changes) == 1:
        return [float(value) for value in changes[0]]
    stacked = np.stack(changes).astype(np.float64)
    there = ~np.isnan(stacked)
    counts = there.sum(0)
    sums = np.where(there, stacked, 0).sum(0)
    return [float(total / count) if count else float("nan") for total, count in zip(sums, counts, strict=True)]


def _storable(text: str) -> str:
    """Returns text that Parquet holds: half a character is written as its code."""
    return text.encode("utf-8", "backslashreplace").decode()


def _is_float(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or (pa.types.is_list(kind) and pa.types.is_floating(kind.value_type)))


def _name_leaf(field: Any) -> str:
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)
