"""What docs/corpora.md has to say, to be run: its commands, and its blocks by language and first comment."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import corpora

PAGE = (Path(__file__).parents[2] / "docs" / "corpora.md").read_text(encoding="utf-8")
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}


def list_commands() -> list[list[str]]:
    """Lists the arguments of every ``ffattr``, with what a shell makes of them."""
    lines = re.findall(r"^    (?:srun )?ffattr (.*)$", PAGE, re.MULTILINE)
    return [
        [re.sub(r"\$(\w+)", lambda name: SLURM[name[1]], word) for word in shlex.split(line, comments=True)]
        for line in lines
    ]


def find_block(language: str, has: str) -> str:
    """Returns the block in this language that has these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if has in block]
    return block


def make_surroundings(folder: Path) -> None:
    """Writes the model and the files that the page speaks of."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    corpora.save_model(folder / "MODEL", num_hidden_layers=6)
    texts = [text for text in corpora.TEXTS if text]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    bodies = "".join(json.dumps({"body": text, "key": number}) + "\n" for number, text in enumerate(texts[:4]))
    for name in ("data", "more", "dataset"):
        (folder / name).mkdir()
    (folder / "data" / "bodies.jsonl").write_text(bodies)
    (folder / "more" / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(bodies.encode()))
    table = pa.table({"text": texts})
    pq.write_table(table.slice(0, 2), folder / "books.parquet")
    arrow = os.fspath(folder / "dataset" / "data-00000-of-00001.arrow")
    with pa.OSFile(arrow, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
