"""Peak memory of `ffattr.attribute` on this machine, each case in a process of its own (Linux).

    python benchmarks/cpu/bench_memory.py [--write]

"extra" is the largest resident size while attributing, less the resident size just before (model loaded, first small
call made) and less the maps returned; "process" is the largest resident size in all; "anonymous" is the largest one
without pages of files, looked at every 10 ms. Random weights: sizes do not depend on them. Of long sequences some of
the queries are computed, more of which would take as many blocks of the same size. ``--write`` keeps the figures in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from kept_figures import write_figures

import ffattr

MiB = 1 << 20
RESULTS = Path(__file__).parents[1] / "results"

# name: (configuration of a BERT, tokens, arguments of attribute)
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 1}
MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
CASES: dict[str, tuple[dict[str, int], int, dict[str, Any]]] = {
    "BERT-base layer, T = 128, all scopes": (BASE, 128, {"scopes": "all"}),
    "BERT-base layer, T = 512, last scope": (BASE, 512, {}),
    "BERT-base layer, T = 512, all scopes": (BASE, 512, {"scopes": "all"}),
    "MiniLM shape, 6 layers, T = 4096, last query": (MINILM, 4096, {"queries": [-1]}),
    "MiniLM shape, 6 layers, T = 8192, every 32nd query, TopK(32)": (
        MINILM,
        8192,
        {"queries": slice(0, None, 32), "keep": ffattr.TopK(32)},
    ),
    "MiniLM shape, 1 layer, T = 32768, every 256th query, Pool(64)": (
        {**MINILM, "num_hidden_layers": 1},
        32768,
        {"queries": slice(0, None, 256), "keep": ffattr.Pool(64)},
    ),
    "MiniLM shape, 1 layer, T = 4096, dense, in a file": (
        {**MINILM, "num_hidden_layers": 1},
        4096,
        {"keep": ffattr.Dense(path=Path(tempfile.gettempdir()) / "ffattr-bench-memory.safetensors")},
    ),
}


def measure(name: str) -> dict[str, float]:
    """Runs in the child process."""
    import psutil
    import torch
    import transformers

    shape, tokens, arguments = CASES[name]
    torch.set_num_threads(2)
    config = transformers.BertConfig(max_position_embeddings=tokens, vocab_size=1000, **shape)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    once = {name: value for name, value in arguments.items() if name in ("scopes", "layers")}
    ffattr.attribute(model, torch.arange(8)[None], **once)  # what a process loads once
    ids = torch.randint(0, 1000, (1, tokens))
    anonymous = [0]
    threading.Thread(target=watch, args=(anonymous,), daemon=True).start()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    attr = ffattr.attribute(model, ids, **arguments)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    tops = [part for top in attr.largest.values() for part in (top.values, top.keys, top.rest, top.total)]
    held = (*attr.maps.values(), *attr.bias.values(), *tops)
    outputs = sum(tensor.numel() * tensor.element_size() for tensor in held)
    if isinstance(arguments.get("keep"), ffattr.Dense):
        arguments["keep"].path.unlink()
        outputs = 0  # they are in the file
    return {
        "extra MiB": round((peak - before - outputs) / MiB, 1),
        "outputs MiB": round(outputs / MiB, 1),
        "process MiB": round(peak / MiB, 1),
        "anonymous MiB": round(anonymous[0] / MiB, 1),
        "planned MiB": round(getattr(attr.plan, "bytes", 0) / MiB, 1),
    }


def watch(largest: list[int]) -> None:
    """Keeps the largest resident size without pages of files."""
    while True:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        largest[0] = max(largest[0], int(status["RssAnon"].split()[0]) * 1024)
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(measure(asked.case)))
        return
    rows = {}
    for name in CASES:
        child = [sys.executable, __file__, "--case", name]
        rows[name] = json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
        print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in rows[name].items()))
    if asked.write:
        write_figures("memory", rows)


if __name__ == "__main__":
    main()
