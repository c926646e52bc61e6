"""`make test-models`: trained models, from packages that only this installs. ``make test`` leaves this folder out."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "benchmarks" / "paper"), str(HERE)]
