"""The import order of CONTRIBUTING.md: every import, lazy ones included, points to the same layer or to a lower one."""

import ast
import subprocess
import sys

import pytest
from paths import PACKAGE

ORDER = [
    {"_C", "_build_info", "_version"},
    {
        "errors",
        "indices",
        "activations",
        "closed_forms",
        "reference",
        "ig",
        "loaded",
        "parameters",
        "experts",
        "clamped",
        "layer",
        "attention",
        "dtypes",
        "memory",
        "sketch",
    },
    {"torch_kernels", "ops", "triton_ops", "reasons", "selfcheck", "backends"},
    {
        "timing",
        "costs",
        "plan",
        "rates",
        "pack",
        "sources",
        "columns",
        "queries",
        "pairs",
        "wide",
        "tiles",
        "engine",
    },
    {"attention_capture", "module_capture", "forward", "capture", "signals", "tokens", "inputs", "groups", "adapters"},
    {"plot", "analysis", "report"},
    {"files", "stores", "keep", "maps"},
    {"scopes", "collect", "request", "api", "decomposed", "bench", "calibrate", "tune"},
    {"reproduction", "pretrained", "examples", "verified", "study"},
    {""},  # the package itself: `import ffattr`
    {"cli", "__main__"},
]
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}


def _module(path):
    """First name of a file's module inside the package: the unit of the order."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def _imports(path):
    """Every module of the package that the file imports anywhere, with the line."""
    inside = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                assert node.level <= len(inside) + 1, f"{path.name}:{node.lineno} imports from outside the package"
                base = ["ffattr", *inside[: len(inside) + 1 - node.level], *base]
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "ffattr":
                known = len(name) > 1 and (name[1] in RANK or (PACKAGE / f"{name[1]}.py").exists())
                yield (name[1] if known else ""), node.lineno


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_build_info.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    module = _module(path)
    assert module in RANK, f"{module} has no place in the import order: give it one in ORDER and in CONTRIBUTING.md"
    for target, line in _imports(path):
        assert target in RANK, f"{path.name}:{line} imports {target}, which has no place in the import order"
        assert RANK[target] <= RANK[module], f"{path.name}:{line}: {module} must not import {target or 'ffattr'}"


def test_modules_of_one_layer_import_each_other_in_no_circle():
    arrows = {}
    for path in FILES:
        module = _module(path)
        arrows.setdefault(module, set()).update(target for target, _ in _imports(path) if target != module)
    while leaves := {module for module, targets in arrows.items() if not targets & arrows.keys()}:
        for leaf in leaves:
            del arrows[leaf]
    assert not arrows, f"these import each other in a circle: {sorted(arrows)}"


@pytest.mark.parametrize(
    "statement", ["from . import x", "from .sub import x", "import ffattr.cli", "from ffattr import cli"]
)
def test_the_reader_sees_every_form(tmp_path, monkeypatch, statement):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "maps.py").write_text(f"def lazy():\n    {statement}\n")
    (found,) = _imports(tmp_path / "maps.py")
    assert found == ("cli" if "cli" in statement else "", 2)


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
def test_what_an_import_does_not_load(code, absent):
    code += f"; import sys; print(*sorted(sys.modules.keys() & set({absent})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
