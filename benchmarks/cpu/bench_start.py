"""How long `import ffattr` takes where torch is there, and `ffattr --help`, in one or several checkouts.

    python benchmarks/cpu/bench_start.py [CHECKOUT ...] [--rounds 7] [--write]

Each is a process of its own, and they run in turns, so that whoever shares the machine counts little: the least of all
rounds is shown, of processor seconds and of seconds from the interpreter's start on, or from torch's import on. Files
are read from the system's cache after the first round. ``--write`` keeps the figures of the first checkout, and of the
others as what was before, in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from kept_figures import describe_machine, write_figures
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = """
import atexit, sys, time
begun = time.process_time(), time.perf_counter()
ended = lambda: (time.process_time() - begun[0], time.perf_counter() - begun[1])
atexit.register(lambda: print(*ended(), file=sys.stderr))
"""
HELP = "import runpy, sys; sys.argv = ['ffattr', '--help']; runpy.run_module('ffattr', run_name='__main__')"
STATEMENTS = {
    "import torch": f"{CLOCKS}\nimport torch",
    "import ffattr, torch being there": f"import torch\n{CLOCKS}\nimport ffattr",
    "ffattr --help": f"{CLOCKS}\n{HELP}",
}


def time_statement(statement: str, checkout: Path) -> tuple[float, float]:
    """Returns processor seconds and seconds of what a process does with the package of ``checkout``."""
    command = [sys.executable, "-c", statement]
    done = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)
    processor, seconds = map(float, done.stderr.splitlines()[-1].split())
    return processor, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    cases = [(checkout.resolve(), name) for checkout in given.checkouts for name in STATEMENTS]
    found: dict[tuple[Path, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(given.rounds):
        for checkout, name in cases:
            found[checkout, name].append(time_statement(STATEMENTS[name], checkout))
    table = Table("checkout", "", "processor seconds", "seconds")
    rows = []
    for (checkout, name), times in found.items():
        processor, seconds = (min(column) for column in zip(*times, strict=True))
        table.add_row(checkout.name, name, f"{processor:.3f}", f"{seconds:.3f}")
        is_first = checkout == cases[0][0]
        rows.append({"of": "now" if is_first else "before", "what": name, "processor": processor, "seconds": seconds})
    Console().print(table)
    if given.write:
        write_figures("start", {"rounds": given.rounds, "machine": describe_machine(1), "rows": rows})


if __name__ == "__main__":
    main()
