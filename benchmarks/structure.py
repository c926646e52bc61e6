"""Measures the house: rooms, floors, arrows, names. ``python benchmarks/structure.py [FOLDER]`` prints a table.

FOLDER is a checkout of the package (default: this one), of any version. Nothing of it is run: files are read as text.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("triton_ops", "ops/triton", "torch_ops.py", "ops/torch_kernels.py", "ops/contract.py", "ops.py")
"""Functions here have the arguments of operators."""
_PREPOSITIONS = re.compile(r"(Of|By|From|Where|As)\b")
_SCOPE_PARTS = re.compile(
    r"CROSS\b(?!\w)|[\"']_?(ff|ln|res|experts|attn_heads|attn|atb|cross\.?)[\"'] ?(in|not in)\b|_experts[\"']\)"
    r"|endswith\([\"']_?(ff|res|ln|experts|attn_heads)|startswith\([\"'](cross|atb|attn)|rpartition\([\"']\.[\"']\)"
)


@dataclass(frozen=True)
class Function:
    """A function or method, and where it is."""

    path: str
    line: int
    name: str
    lines: int
    parameters: int
    docstring: str

    @property
    def one_word(self) -> bool:
        return "_" not in self.name.strip("_")


def read_functions(package: Path) -> Iterator[Function]:
    """Every function of a package but those with two underscores on both sides."""
    for path in list_files(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or re.fullmatch("__.*__", node.name):
                continue
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            where = path.relative_to(package).as_posix()
            yield Function(where, node.lineno, node.name, length, count, ast.get_docstring(node) or "")


def read_docstrings(package: Path) -> Iterator[tuple[str, str]]:
    """``(path, first words)`` of every docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in list_files(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(package).as_posix()}:{getattr(node, 'lineno', 1)}", text


def list_files(package: Path) -> list[Path]:
    """The package's Python files without what a build has written."""
    return sorted(path for path in package.rglob("*.py") if path.name != "_build_info.py")


def read_arrows(package: Path) -> dict[str, set[str]]:
    """Which modules each module imports, both by their dotted names inside the package."""
    names = {dotted(path, package) for path in list_files(package)}
    arrows: dict[str, set[str]] = {name: set() for name in names}
    for path in list_files(package):
        module = dotted(path, package)
        inside = list(path.relative_to(package).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole, part = ".".join([*base, alias.name]), ".".join(base)
                target = whole if whole in names else part
                if target != module:
                    arrows[module].add(target)
    return arrows


def dotted(path: Path, package: Path) -> str:
    """``engine.plan`` of ``engine/plan.py``, ``engine`` of ``engine/__init__.py``."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def count_floors(arrows: dict[str, set[str]]) -> tuple[int, list[str]]:
    """How many steps the longest way down is, and what stands in a circle. The package itself is left out."""
    left = {module: targets - {"", module} for module, targets in arrows.items() if module}
    floors = 0
    while ground := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in ground}
        floors += 1
    return floors, sorted(left)


def count_room_arrows(arrows: dict[str, set[str]]) -> int:
    """Pairs of rooms (top-level folders or files) of which one imports the other."""
    pairs = {(one.partition(".")[0], to.partition(".")[0]) for one, targets in arrows.items() for to in targets}
    return len({(one, to) for one, to in pairs if one and to and one != to})


def find_scope_parts(package: Path) -> list[str]:
    """Lines where the name of a scope is taken apart or put together."""
    found = []
    for path in list_files(package):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = line.split("#")[0]
            if "import" not in code and _SCOPE_PARTS.search(code):
                found.append(f"{path.relative_to(package).as_posix()}:{number}")
    return found


def measure(package: Path) -> dict[str, object]:
    """All figures of a package, by what they are called."""
    files, functions, arrows = list_files(package), list(read_functions(package)), read_arrows(package)
    folders = Counter(path.relative_to(package).parent.as_posix() for path in files)
    floors, circle = count_floors(arrows)
    one_word = [function for function in functions if function.one_word]
    crowded = [
        function
        for function in functions
        if function.name.startswith("_") and function.parameters > 8 and not function.path.startswith(KERNELS)
    ]
    prepositions = [where for where, text in read_docstrings(package) if _PREPOSITIONS.match(text)]
    parts = find_scope_parts(package)
    return {
        "files": len(files),
        "loose files": folders["."],
        "folders": len(folders) - 1,
        "most files in a folder": max(folders.values()),
        "floors of the import graph": floors,
        "modules in a circle": len(circle),
        "arrows between rooms": count_room_arrows(arrows),
        "functions": len(functions),
        "one-word names": f"{len(one_word)} ({len(one_word) / max(1, len(functions)):.0%})",
        "functions over 60 lines": sum(function.lines > 60 for function in functions),
        "private functions with more than 8 parameters, outside kernels": len(crowded),
        "docstrings that begin with Of, By, From, Where, As": len(prepositions),
        "places where a scope's name is taken apart": f"{len(parts)} in {len({p.split(':')[0] for p in parts})} files",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--names", action="store_true", help="list the one-word names of functions, by file")
    asked = parser.parse_args()
    package = asked.folder / "ffattr"
    if asked.names:
        for function in read_functions(package):
            if function.one_word:
                print(f"{function.path}:{function.line} {function.name}")
        return
    for name, value in measure(package).items():
        print(f"{name:70} {value}")


if __name__ == "__main__":
    main()
