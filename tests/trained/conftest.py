"""`make test-models`: trained models, from packages that only this installs. ``make test`` leaves this folder out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
