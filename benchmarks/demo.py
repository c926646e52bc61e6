"""``make demo``: the maps of two small trained models on a paragraph of English, and what each component changes.

Writes ``demo/<model>.html`` (a page to look around in), ``demo/<model>.png`` (every layer), ``demo/<model>-layer.png``
(the last one with its tokens) and ``demo/<model>.safetensors``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent / "paper"))
from models import MODELS

import ffattr
from ffattr.analysis import contextualization_change
from ffattr.plot import layer_grid
from ffattr.results import Attribution

OUTPUT = Path(__file__).resolve().parent.parent / "demo"

# Herman Melville, Moby-Dick (1851), chapter 1.
TEXT = """\
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing \
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is \
a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the \
mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin \
warehouses, and bringing up the rear of every funeral I meet, then I account it high time to get to sea as soon as I \
can."""


def main() -> None:
    console = Console()
    OUTPUT.mkdir(exist_ok=True)
    for name in MODELS:
        console.rule(name)
        _demonstrate(name, console)


def _demonstrate(name: str, console: Console) -> None:
    started = time.perf_counter()
    loaded = MODELS[name]()
    console.print(f"loaded in {time.perf_counter() - started:.1f} s")

    options = {"tokenizer": loaded.tokenizer}
    scopes = list(ffattr.attribute(loaded.model, "a", layers=[0], scopes="all", **options).scopes)
    scopes.remove("attn_heads")  # one map per head: large, and no component of the feed-forward block needs it
    with Progress(console=console, transient=True) as bars:
        task = bars.add_task("layers", total=None)
        started = time.perf_counter()
        attribution = ffattr.attribute(
            loaded.model,
            TEXT,
            scopes=scopes,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
            **options,
        )
    seconds = time.perf_counter() - started
    console.print(repr(attribution), highlight=False, soft_wrap=True)
    console.print(
        f"mapped in {seconds:.2f} s; the recomputed layer outputs differ from the model's own by at most "
        f"{float(attribution.error.max()):.1e} (relative)"
    )
    console.print(str(attribution.plan), markup=False, highlight=False, soft_wrap=True)
    console.print(_table(attribution))
    _write(attribution, name, console)


def _table(attribution: Attribution) -> Table:
    changes = contextualization_change(attribution)
    wide = changes.pivot_table(index="layer", columns="component", values="value", sort=False)
    table = Table("layer", *wide.columns, title="contextualization change, 1 - Spearman rho")
    for layer, row in wide.iterrows():
        table.add_row(str(layer), *(f"{value:.3f}" for value in row))
    return table


def _write(attribution: Attribution, name: str, console: Console) -> None:
    files = [OUTPUT / f"{name}{suffix}" for suffix in (".png", "-layer.png", ".safetensors", ".html")]
    title = f"{name}, {attribution.scopes[-1]}"
    layer_grid(attribution["layer"][:, 0], attribution.layers, title, scale="log").savefig(files[0], dpi=150)
    attribution.plot(scale="log").savefig(files[1], dpi=110)
    attribution.save(files[2])
    attribution.to_html(files[3])
    for file in files:
        console.print(f"wrote {file.relative_to(OUTPUT.parent)}")


if __name__ == "__main__":
    main()
