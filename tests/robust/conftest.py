"""The table of what was tried, at the end of the tests."""

from collections import Counter

import pytest
from hostile import FOUND, TALLY

OUTCOMES = ("own", "right", "foreign", "wrong")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TALLY:
        return
    terminalreporter.section("tried")
    terminalreporter.write_line("| | tried | own error | right | foreign | wrong |")
    terminalreporter.write_line("| --- | ---: | ---: | ---: | ---: | ---: |")
    for area, counts in TALLY.items():
        found = Counter(counts)
        cells = " | ".join(f"{found[outcome]:,}" for outcome in OUTCOMES)
        terminalreporter.write_line(f"| {area} | {sum(found.values()):,} | {cells} |")
    for line in sorted(set(FOUND)):
        terminalreporter.write_line(line)
