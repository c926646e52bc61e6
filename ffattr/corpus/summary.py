"""What the tables of a corpus say of all documents together, read part by part: memory does not grow with them.

Shapes: ``L`` layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..analysis.category_rates import tabulate_rates
from ..analysis.change import BOUNDS, COLUMNS
from ..machine import replacing
from ..models.registry import resolve
from ..selection import parse_indices
from ..study import Study, add_examples
from ..study.origins import Origin, shorten_text
from .documents import read_shard
from .settings import Run, read_run
from .shards import is_done
from .tables import COMMIT, Layout, choose_encodings, list_parts, name_change, part_path

if TYPE_CHECKING:
    import pandas

__all__ = ["add_first_texts", "merge_parts", "summarize"]

_NORMAL = 1.959964  # standard errors to both sides, between which 95 % of means lie
_LARGE = 256 * 2**20  # bytes of a file of merged parts
_ORDER = ["amplification", "shard", "row", "window", "query", "key"]


def summarize(folder: str | Path, k: int = 50) -> Study:
    """Returns what a finished run found: the frames of a `Study` that need no maps.

    ``contextualization_change`` has the mean over the documents, their number and its standard error;
    ``amplified_pairs`` the ``k`` pairs of each layer that are amplified most, of those that were kept of each document;
    ``amplified_categories`` their categories and those of all pairs; ``token_summary`` the means of each token over all
    its places; ``errors`` how many documents have an error of each kind, and where and what the first is. Lines are
    numbered from 1, rows from 0. Raises FileNotFoundError where ``folder``
    holds no run, ValueError where shards of it are missing.
    """
    run = read_run(Path(folder))
    missing = [number for number in range(len(run.shards)) if not is_done(run.folder, number)]
    if missing:
        raise ValueError(
            f"the run in {str(folder)!r} is not finished, {len(missing)} of {len(run.shards)} shards are missing "
            f"(first shard {missing[0]}): run `ffattr corpus` on it again"
        )
    study = Study(Path(run.model).name or run.model)
    documents = _Documents.read(run)
    if documents.errors.total() == run.documents:
        kinds = ", ".join(f"{count} {kind}" for kind, count in documents.errors.items())
        raise ValueError(f"none of the documents could be measured: {kinds}")
    study.add("contextualization_change", documents.average_changes)
    if list_parts(run.folder, "pairs"):
        pairs, fewest = _select_pairs(run, k)
        study.add("amplified_pairs", lambda: pairs)
        if len(pairs):
            study.add("amplified_categories", lambda: documents.rate_categories(pairs))
        if fewest:
            study.left_out["some of amplified_pairs"] = fewest
    if list_parts(run.folder, "tokens"):
        study.add("token_summary", lambda: _average_tokens(run))
    if documents.errors:
        import pandas as pd

        counts = [(kind, count, *documents.first_errors[kind]) for kind, count in sorted(documents.errors.items())]
        names = ["error_type", "documents", "first_source", "first_line", "first_error"]
        study.frames["errors"] = pd.DataFrame(counts, columns=names)
    return study


def add_first_texts(
    study: Study, folder: str | Path, model: Any, tokenizer: Any, detailed: int = 8, rolled: bool = False
) -> None:
    """Adds to what `summarize` gave what it takes maps or vectors to see, of the first documents (`add_examples`).

    Their texts are read again. Raises ValueError where their files were changed since.
    """
    run = read_run(Path(folder))
    most = resolve(model).max_positions
    origins = [
        origin
        for origin in _read_first_texts(run, max(20, detailed))
        if most is None or len(tokenizer(origin.text)["input_ids"]) <= most
    ]
    texts = [origin.text for origin in origins]
    layers = None if run.options.layers is None else parse_indices(run.options.layers)
    if texts:
        given = {"tokenizer": tokenizer, "layers": layers}
        add_examples(study, model, texts, detailed=detailed, rolled=rolled, origins=origins, **given)


def _read_first_texts(run: Run, count: int) -> list[Origin]:
    """Returns the texts of the first documents that have no error and were not cut, with their places."""
    found: list[Origin] = []
    for number, shard in enumerate(run.shards):
        table = pq.ParquetFile(part_path(run.folder, COMMIT, number)).read(columns=["row", "error_type", "windows"])
        good = {row["row"] for row in table.to_pylist() if row["error_type"] is None and row["windows"] == 1}
        source = run.sources[shard.source]
        found += [
            Origin(document.text, document.row + 1, source.path, document.id)
            for document in read_shard(source, shard, run.options.text, run.options.id)
            if document.row in good and isinstance(document.text, str)
        ]
        if len(found) >= count:
            break
    return found[:count]


def merge_parts(folder: str | Path, target: str | Path) -> list[Path]:
    """Writes the tables of a run anew as few files of about 256 MB into ``target``; returns them.

    The parts stay as they are.
    """
    written: list[Path] = []
    for table in ("documents", "pairs", "tokens", "top", "scores"):
        batch: list[Path] = []
        for path in [*list_parts(Path(folder), table), None]:
            if batch and (path is None or sum(one.stat().st_size for one in batch) + path.stat().st_size > _LARGE):
                name = f"{table}-{sum(one.name.startswith(table) for one in written):05d}.parquet"
                written.append(Path(target) / name)
                _join_files(batch, written[-1])
                batch = []
            if path is not None:
                batch.append(path)
    return written


def _join_files(parts: Sequence[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = pq.read_schema(parts[0])
    with replacing(target) as temporary, pq.ParquetWriter(temporary, schema, **choose_encodings(schema)) as writer:
        for part in parts:
            writer.write_table(pq.ParquetFile(part).read())


def _iterate_parts(run: Run, table: str) -> Iterator[tuple[int, pa.Table]]:
    """Yields each part with the number of its shard."""
    for number in range(len(run.shards)):
        yield number, pq.ParquetFile(part_path(run.folder, table, number)).read()


@dataclass
class _Documents:
    """Holds sums over the documents: by component how many have a change in each layer ``[L]``, its mean and the sum of
    squared differences from it; counts of pairs by category, and of errors by type."""

    layout: Layout
    changes: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first_errors: dict[str, tuple[str, int, str]] = field(default_factory=dict)  # source, line, message

    @classmethod
    def read(cls, run: Run) -> _Documents:
        found = None
        for _, table in _iterate_parts(run, COMMIT):
            found = found or cls(Layout.from_schema(table.schema))
            for component, *_ in found.layout.components:
                found._add_changes(component, table.column(name_change(component)))
            for name in ("pairs", *found.layout.categories):
                found.counts[name] += pc.sum(table.column(f"all_{name}")).as_py() or 0
            found.errors.update(table.column("error_type").drop_null().to_pylist())
            failed = table.select(["error_type", "source", "row", "error"]).filter(pc.is_valid(table["error_type"]))
            for row in failed.to_pylist():
                place = row["source"], row["row"] + 1, row["error"]
                found.first_errors.setdefault(row["error_type"], place)
        assert found is not None  # a run has a shard
        return found

    def average_changes(self) -> pandas.DataFrame:
        """Returns the frame of `contextualization_change` with the number of ``documents`` and the ``standard_error``
        of their mean, from which ``low`` and ``high`` follow."""
        import pandas as pd

        rows = []
        for place, layer in enumerate(self.layout.layers):
            for component, before, after in self.layout.components:
                count, mean, squares = (float(part[place]) for part in self.changes[component])
                value = mean if count else math.nan
                error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
                ends = value - _NORMAL * error, value + _NORMAL * error
                rows.append((layer, component, before, after, value, *ends, int(count), error))
        return pd.DataFrame(rows, columns=[*COLUMNS, *BOUNDS, "documents", "standard_error"])

    def rate_categories(self, pairs: pandas.DataFrame) -> pandas.DataFrame:
        """Returns the frame of `category_rates`, of these pairs and all that there are."""
        names = self.layout.categories
        drawn = {
            layer: (len(of_layer), {name: int(of_layer[name].sum()) for name in names})
            for layer in self.layout.layers
            if len(of_layer := pairs[pairs["layer"] == layer])
        }
        return tabulate_rates(drawn, self.counts["pairs"], {name: self.counts[name] for name in names})

    def _add_changes(self, component: str, column: Any) -> None:
        """Joins what one part has with what came before (Chan, Golub and LeVeque 1979)."""
        values = np.array(column.drop_null().to_pylist(), dtype=np.float64).reshape(-1, len(self.layout.layers))
        there = ~np.isnan(values)
        count = there.sum(0).astype(np.float64)
        mean = np.where(there, values, 0).sum(0) / np.maximum(count, 1)
        squares = np.where(there, (values - mean) ** 2, 0).sum(0)
        n, m, s = self.changes.get(component, (np.zeros_like(count),) * 3)
        total = np.maximum(n + count, 1)
        step = mean - m
        self.changes[component] = n + count, m + step * count / total, s + squares + step**2 * n * count / total


def _select_pairs(run: Run, k: int) -> tuple[pandas.DataFrame, str]:
    """Returns the ``k`` most amplified pairs of each layer, and what keeps them from being those of all that there are:
    nothing where no document has all of its kept pairs among them."""
    import pandas as pd

    best: pandas.DataFrame | None = None
    for number, table in _iterate_parts(run, "pairs"):
        frame = table.to_pandas().assign(shard=number)
        together = frame if best is None else pd.concat([best, frame], ignore_index=True)
        ordered = together.sort_values(_ORDER, ascending=[False, *[True] * (len(_ORDER) - 1)], kind="stable")
        best = ordered.groupby("layer", sort=False).head(k)
    assert best is not None  # a run has a shard
    best = best.sort_values("layer", kind="stable", ignore_index=True)
    cut = best["rank"] == run.options.pairs
    best["rank"] = best.groupby("layer").cumcount() + 1
    best = _tell_documents(run, best)
    first = ["layer", "rank", "source", "line", "id", "text", "row", "window"]
    found = best[[*first, *(name for name in best if name not in (*first, "shard"))]]
    if run.options.pairs >= k or not cut.any():
        return found, ""
    return found, (
        f"{int(cut.sum())} times all {run.options.pairs} pairs that were kept of a document and layer are among these "
        f"{k}: there may be more of it (--pairs {k} keeps all that count)"
    )


def _tell_documents(run: Run, pairs: pandas.DataFrame) -> pandas.DataFrame:
    """Returns pairs with line, identifier and text of their documents, which are read again; without the text where
    files were changed since."""
    told: dict[tuple[int, int], Any] = {}
    for number in sorted(set(pairs["shard"])):
        shard = run.shards[number]
        rows = set(pairs.loc[pairs["shard"] == number, "row"])
        try:
            documents = read_shard(run.sources[shard.source], shard, run.options.text, run.options.id)
            told |= {(number, document.row): document for document in documents if document.row in rows}
        except (OSError, ValueError):
            continue
    found = [told.get(place) for place in zip(pairs["shard"], pairs["row"], strict=True)]
    texts = [shorten_text(one.text) if one is not None and isinstance(one.text, str) else None for one in found]
    ids = [None if one is None else one.id for one in found]
    told_pairs = pairs.assign(line=pairs["row"] + 1)
    told_pairs["id"], told_pairs["text"] = ids, texts
    return told_pairs


def _average_tokens(run: Run) -> pandas.DataFrame:
    """Returns the means of what each token has at all its places: one row for each scope, layer and token."""
    import pandas as pd

    sums: pandas.DataFrame | None = None
    at = ["scope", "layer", "token"]
    for _, table in _iterate_parts(run, "tokens"):
        frame = table.select([*at, "norm", "own", "gives"]).to_pandas()
        frame[["norm", "own", "gives"]] = frame[["norm", "own", "gives"]].astype("float64")
        found = frame.assign(count=1, takes=np.where(frame["norm"] > 0, 1 - frame["own"], 0.0)).groupby(at).sum()
        sums = found if sums is None else pd.concat([sums, found]).groupby(at).sum()
    assert sums is not None  # a run has a shard
    names = ["norm", "own", "takes", "gives"]
    return sums[names].div(sums["count"], axis=0).assign(count=sums["count"]).reset_index()
