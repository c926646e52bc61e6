"""The rooms and the arrows between them: every import, lazy ones included, goes the way of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import BENCHMARKS, PACKAGE, ROOT

sys.path.insert(0, str(BENCHMARKS))
from structure import list_files, measure, read_arrows

LOOSE = {"", "__main__", "_version", "errors", "machine", "selection"}
ROOMS = {
    "_version": set(),
    "errors": set(),
    "selection": set(),
    "machine": {"errors"},
    "decomposition": {"errors"},
    "ops": {"errors", "machine", "decomposition"},
    "engine": {"errors", "machine", "decomposition", "ops"},
    "models": {"errors", "selection", "machine", "decomposition"},
    "analysis": {"errors", "selection"},
    "plot": {"errors", "selection"},
    "report": {"errors", "selection"},
    "results": {"errors", "selection", "machine", "analysis", "plot", "report"},
    "pipeline": {"_version", "errors", "selection", "decomposition", "ops", "engine", "models", "results"},
    "bench": {"errors", "machine", "decomposition", "ops", "engine"},
    "study": {"errors", "machine", "decomposition", "models", "analysis", "plot", "results", "pipeline"},
    "corpus": {
        *("_version", "errors", "selection", "machine", "engine", "ops"),
        *("models", "analysis", "results", "pipeline", "study"),
    },
    "integrations": {"pipeline"},
    "cli": {
        *("_version", "errors", "selection", "machine", "decomposition", "ops", "engine", "models"),
        *("analysis", "plot", "report", "results", "pipeline", "bench", "study", "corpus"),
    },
    "__main__": {"cli"},
}
"""Every room with those that it may import; the package itself, `import ffattr`, loads what it is asked for."""
TOUCHES_MODULES = {"models", "pipeline", "study"}
ARROWS = read_arrows(PACKAGE)


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", list_files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    if module == "":
        return
    assert room(module) in ROOMS, f"{room(module)} is no room: give it a place in ROOMS and in CONTRIBUTING.md"
    for target in ARROWS[module]:
        allowed = {room(module), *ROOMS[room(module)]}
        if room(module) == "cli":  # which shows the package's own version and names
            allowed.add("")
        assert room(target) in allowed, f"{module} must not import {target or 'the package itself'}"


def test_nothing_imports_in_a_circle() -> None:
    left = {module: targets - {"", module} for module, targets in ARROWS.items() if module}
    while ground := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in ground}
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_rooms_are_small_and_little_lies_beside_them() -> None:
    names = [path.relative_to(PACKAGE) for path in list_files(PACKAGE)]
    assert {name.stem.replace("__init__", "") for name in names if len(name.parts) == 1} <= LOOSE
    assert {folder for folder, files in Counter(name.parent for name in names).items() if files > 14} == set()


def test_modules_of_torch_are_touched_where_users_models_are() -> None:
    pattern = re.compile(r"\bnn\.Module\b")
    for path in list_files(PACKAGE):
        if path.relative_to(PACKAGE).parts[0] not in TOUCHES_MODULES:
            assert not pattern.search(path.read_text()), f"{path.relative_to(ROOT)} names nn.Module"


def test_every_room_says_what_it_is() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        assert 1 <= len(lines) <= 25 or path.parent == PACKAGE / "decomposition", path


def every_test() -> Iterator[Path]:
    skipped = {"helpers", "trained"}
    return (path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name not in skipped)


def test_tests_are_where_the_code_is() -> None:
    """``tests/<room>/test_<module>[_<aspect>].py``."""
    for path in every_test():
        folder = path.relative_to(ROOT / "tests").parent
        if folder.parts[:1] in ((), ("csrc",), ("benchmarks",), ("robust",)):
            continue
        modules = {module.stem for module in (PACKAGE / folder).glob("*.py")}
        name = path.stem.removeprefix("test_")
        assert any(name == module or name.startswith(f"{module}_") for module in modules), (
            f"{path.relative_to(ROOT)} tests no module of ffattr/{folder}"
        )


def test_every_module_has_its_tests() -> None:
    names = {path.relative_to(ROOT / "tests") for path in every_test()}
    for path in list_files(PACKAGE):
        module = path.relative_to(PACKAGE)
        if module.stem.startswith("_"):
            continue
        mine = {name for name in names if name.parent == module.parent}
        stem = f"test_{module.stem}"
        assert any(name.stem == stem or name.stem.startswith(f"{stem}_") for name in mine), (
            f"no tests/{module.parent}/{stem}.py"
        )


def test_the_house_stays_in_order() -> None:
    """What `benchmarks/structure.py` measures, held to what was reached."""
    found = measure(PACKAGE)
    assert found["modules in a circle"] == 0
    assert found["private functions with more than 8 parameters, outside kernels"] == 0
    assert found["docstrings that begin with Of, By, From, Where, As"] == 0
    assert found["most files in a folder"] <= 14


@pytest.mark.parametrize(
    "statement",
    ["from . import x", "from .sub import x", "from .sub import part as x", "def f():\n    from . import x"],
)
def test_the_reader_sees_every_form(tmp_path: Path, statement: str) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("x.py", "sub/__init__.py", "sub/part.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "maps.py").write_text(statement + "\n")
    expected = {"from . import x": "x", "from .sub import x": "sub", "from .sub import part as x": "sub.part"}
    assert read_arrows(tmp_path)["maps"] == {expected.get(statement, "x")}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import ffattr; ffattr.attribute", ["transformers", "triton", "matplotlib", "pandas"]),
        ("import ffattr; ffattr.analysis, ffattr.plot, ffattr.report, ffattr.study", ["matplotlib", "pandas", "spacy"]),
        (
            "import sys; sys.argv[0] = 'ffattr'; import ffattr.cli",
            ["torch", "transformers", "matplotlib", "pandas", "numpy"],
        ),
    ],
)
def test_what_an_import_does_not_load(code: str, absent: list[str]) -> None:
    code += f"; import sys; print(*sorted(sys.modules.keys() & set({absent})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
