"""A corpus of any number of documents: computed by processes that may die, into tables, with nothing lost.

In come files of documents and a model's name; out comes a folder of Parquet tables, one part for each shard, and of
these a `Study`. Above `pipeline`: a shard knows documents, batches and tables, never a formula.

Read
    run.py         the whole way, and the data flow
    settings.py    what a run is, written down once; documents.py: its files, cut into shards
    shards.py      one shard from its documents to its commit; journal.py: what a process did not survive
    mapper.py      documents to pieces to batches; measure.py: a batch through `ffattr.attribute`; pieces.py: both
    tables.py      the columns, and how they lie on the disk
    supervise.py   which worker gets which shard; local.py: processes; on_ray.py: Ray actors
    summary.py     the tables of all shards as a study
"""

from .documents import find_sources, plan_shards
from .mapper import Mapper
from .run import Count, Rank, TooManyErrors, run_corpus
from .settings import Options, RunMismatch, read_run
from .shards import is_done
from .summary import add_first_texts, merge_parts, summarize

__all__ = [
    "Count",
    "Mapper",
    "Options",
    "Rank",
    "RunMismatch",
    "TooManyErrors",
    "add_first_texts",
    "find_sources",
    "is_done",
    "merge_parts",
    "plan_shards",
    "read_run",
    "run_corpus",
    "summarize",
]
