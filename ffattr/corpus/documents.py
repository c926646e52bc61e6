"""Documents: the files that hold them, the plan that cuts files into shards, and the documents of one shard.

A document is a row of a source: a line of text (``.txt``) or of JSON (``.jsonl``), each also as ``.gz`` or ``.zst``, a
row of Parquet, or of the Arrow files that Hugging Face's ``save_to_disk`` writes.
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Document", "Failure", "Shard", "Source", "find_sources", "plan_shards", "read_shard"]

_KINDS = {".txt": "lines", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
_PACKED = (".gz", ".zst")
_TEXT_KINDS = ("lines", "jsonl")
_KNOWN = "expected .txt, .jsonl (these also .gz or .zst), .parquet, or a folder that save_to_disk wrote"


@dataclass(frozen=True)
class Failure:
    """Why there is nothing of a document: the name of the kind of error, and a sentence."""

    kind: str
    message: str

    @classmethod
    def from_error(cls, error: Exception) -> Failure:
        return cls(type(error).__name__, " ".join(str(error).split()) or type(error).__name__)


@dataclass(frozen=True)
class Document:
    """One row of a source: its ``text``, or why it has none."""

    row: int
    text: str | Failure
    id: str | None = None


@dataclass(frozen=True)
class Source:
    """A file of documents, with its size in bytes and the time of its last change in nanoseconds."""

    path: str
    kind: str
    size: int
    changed: int

    @classmethod
    def from_path(cls, path: str) -> Source:
        """Raises ValueError for a kind of file that is not read."""
        name = Path(path).name.lower()
        packed = next((ending for ending in _PACKED if name.endswith(ending)), "")
        suffix = Path(name.removesuffix(packed)).suffix
        kind = _KINDS.get(suffix)
        if kind is None or (packed and kind not in _TEXT_KINDS):
            raise ValueError(f"cannot tell what kind of documents {path!r} holds: {_KNOWN}")
        found = os.stat(path)
        return cls(os.path.abspath(path), kind, found.st_size, found.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raises ValueError where the file is no longer what was planned."""
        if Source.from_path(self.path) != self:
            raise ValueError(f"{self.path!r} was changed since the run was planned: use another output folder")


@dataclass(frozen=True)
class Shard:
    """A slice of ``count`` rows of the source at place ``source`` from row ``first`` on, which begins ``offset`` bytes
    into a file of lines (unpacked)."""

    source: int
    first: int
    count: int
    offset: int


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Returns the files that names of files, globs and folders stand for, each once, in order.

    Raises FileNotFoundError for a name that stands for none, ValueError for a kind of file that is not read.
    """
    paths = dict.fromkeys(path for given in inputs for path in _find_paths(given))
    sources = {source.path: source for source in map(Source.from_path, paths)}
    if not sources:
        raise FileNotFoundError("no input was given, expected files of documents")
    return list(sources.values())


def plan_shards(sources: Sequence[Source], shard_docs: int, text: str, id_column: str | None) -> list[Shard]:
    """Cuts every source into shards of ``shard_docs`` documents. Raises ValueError where a source has no such columns
    or where there is no document at all."""
    shards: list[Shard] = []
    for place, source in enumerate(sources):
        if source.kind in _TEXT_KINDS:
            shards += _plan_lines(place, source, shard_docs, text, id_column)
        else:
            rows = _count_rows(source, [text] if id_column is None else [text, id_column])
            starts = range(0, rows, shard_docs)
            shards += [Shard(place, first, min(shard_docs, rows - first), 0) for first in starts]
    if not shards:
        raise ValueError(f"there is no document in {', '.join(source.path for source in sources)}")
    return shards


def read_shard(source: Source, shard: Shard, text: str, id_column: str | None) -> list[Document]:
    """Reads the documents of a shard; one that cannot be read has a `Failure` in the place of its text.

    Raises ValueError for a source that changed since it was planned, OSError where it cannot be read at all.
    """
    source.check_unchanged()
    if source.kind in _TEXT_KINDS:
        with _open(source) as file:
            _skip_bytes(file, shard.offset)
            lines = list(itertools.islice(file, shard.count))
        found = [
            _read_line(source.kind, line, text, id_column, row == 0) for row, line in enumerate(lines, shard.first)
        ]
    else:
        found = list(_read_columns(source, shard, text, id_column))
    if len(found) != shard.count:
        raise OSError(
            f"{source.path!r} ends after row {shard.first + len(found)}, where {shard.count} more were planned"
        )
    return [Document(row, *one) for row, one in enumerate(found, shard.first)]


def _find_paths(given: str) -> Iterator[str]:
    path = Path(given)
    if path.is_dir():
        found = sorted(str(one) for one in path.rglob("*") if one.is_file() and not _is_hidden(one.relative_to(path)))
        known = [one for one in found if _is_known(one)]
        if not known:
            raise FileNotFoundError(f"the folder {given!r} holds no documents: {_KNOWN}")
        yield from known
    elif path.exists():
        yield given
    else:
        matches = sorted(one for one in glob.glob(given, recursive=True) if os.path.isfile(one))
        if not matches:
            raise FileNotFoundError(f"no file {given!r}, and no file has a name like it")
        yield from matches


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _is_known(path: str) -> bool:
    try:
        Source.from_path(path)
    except ValueError:
        return False
    return True


# Lines.


def _open(source: Source) -> BinaryIO:
    """Opens a file of lines, unpacked. Raises ValueError where what unpacks it is not installed."""
    if source.path.lower().endswith(".gz"):
        return gzip.open(source.path, "rb")  # type: ignore[return-value]
    if source.path.lower().endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{source.path!r} needs zstandard: pip install 'ffattr[corpus]'") from None
        packed = open(source.path, "rb")  # noqa: SIM115 - the reader closes it
        reader: Any = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True, closefd=True)
        return io.BufferedReader(reader, 2**20)
    return open(source.path, "rb")


def _skip_bytes(file: BinaryIO, count: int) -> None:
    if type(file) is io.BufferedReader and file.seekable() and isinstance(file.raw, io.FileIO):
        file.seek(count)
        return
    while count > 0:
        skipped = len(file.read(min(count, 2**20)))
        if not skipped:
            return
        count -= skipped


def _plan_lines(place: int, source: Source, shard_docs: int, text: str, id_column: str | None) -> Iterator[Shard]:
    first = count = start = at = 0
    with _open(source) as file:
        for line in file:
            if at == 0 and source.kind == "jsonl":
                _check_keys(source, line, text, id_column)
            if count == shard_docs:
                yield Shard(place, first, count, start)
                first, count, start = first + count, 0, at
            count, at = count + 1, at + len(line)
    if count:
        yield Shard(place, first, count, start)


def _check_keys(source: Source, line: bytes, text: str, id_column: str | None) -> None:
    """Raises ValueError where the first line has other keys: all others will have as well."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return
    _check_columns(source, found if isinstance(found, dict) else {}, [text] if id_column is None else [text, id_column])


def _check_columns(source: Source, there: Iterable[str], wanted: Sequence[str]) -> None:
    names = list(there)
    for name in wanted:
        if name not in names:
            raise ValueError(f"{source.path!r} has no column {name!r}: it has {', '.join(map(str, names)) or 'none'}")


def _read_line(
    kind: str, line: bytes, text: str, id_column: str | None, is_first: bool
) -> tuple[str | Failure, str | None]:
    """Returns the text of a line and its id."""
    try:
        content = line.decode("utf-8-sig" if is_first else "utf-8").strip()
        if kind == "lines" or not content:
            return content, None
        found = json.loads(content)
    except ValueError as error:  # not UTF-8, or no JSON
        return Failure.from_error(error), None
    if not isinstance(found, dict):
        return Failure("NotText", f"a {type(found).__name__}, expected a JSON object"), None
    return _check_text(found.get(text), text), _name_id(found.get(id_column))


# Columns.


def _count_rows(source: Source, wanted: Sequence[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source.kind == "parquet":
        with pq.ParquetFile(source.path) as file:
            _check_columns(source, file.schema_arrow.names, wanted)
            return int(file.metadata.num_rows)
    with pa.memory_map(source.path) as file, pa.ipc.open_stream(file) as reader:
        _check_columns(source, reader.schema.names, wanted)
        return sum(batch.num_rows for batch in reader)


def _read_columns(
    source: Source, shard: Shard, text: str, id_column: str | None
) -> Iterator[tuple[str | Failure, str | None]]:
    start = 0
    for batch in _iterate_batches(source, [text] if id_column is None else [text, id_column], shard):
        first, last = max(shard.first - start, 0), min(shard.first + shard.count - start, batch.num_rows)
        if first < last:
            some = batch.slice(first, last - first)
            ids = [None] * some.num_rows if id_column is None else some.column(id_column).to_pylist()
            for value, one in zip(_list_values(some.column(text)), ids, strict=True):
                yield value if isinstance(value, Failure) else _check_text(value, text), _name_id(one)
        start += batch.num_rows


def _iterate_batches(source: Source, columns: list[str], shard: Shard) -> Iterator[pyarrow.RecordBatch]:
    """Yields all batches of rows before the end of the shard; of those before its beginning, empty columns' worth."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    end, start = shard.first + shard.count, 0
    if source.kind == "parquet":
        with pq.ParquetFile(source.path) as file:
            for group in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start + rows > shard.first and start < end:
                    yield from file.iter_batches(row_groups=[group], columns=columns)
                elif start < end:
                    yield pa.record_batch({"": pa.nulls(rows)})
                start += rows
        return
    with pa.memory_map(source.path) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            if start >= end:
                return
            yield batch.select(columns)
            start += batch.num_rows


def _list_values(column: pyarrow.Array) -> list[Any]:
    """Returns the values of a column; bytes that are no UTF-8 are each a `Failure` of their own."""
    try:
        return list(column.to_pylist())
    except ValueError:
        return [_read_scalar(value) for value in column]


def _read_scalar(value: Any) -> Any:
    try:
        return value.as_py()
    except ValueError as error:
        return Failure.from_error(error)


def _check_text(value: Any, column: str) -> str | Failure:
    if isinstance(value, str):
        return value
    if value is None:
        return Failure("NotText", f"nothing in column {column!r}, expected text")
    return Failure("NotText", f"a {type(value).__name__} in column {column!r}, expected text")


def _name_id(value: Any) -> str | None:
    """Returns an id as text that any table holds."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()
