"""ffattr: how much each input token contributes to each output token of every Transformer layer, FF block included.

attr = ffattr.attribute(model, inputs, scopes="layer")
attr.maps["atb_ff_res_ln"]  # [layers, batch, query, key]

The public names are in ``__init__.pyi``, which editors and type checkers read as well.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ._version import __version__ as __version__


def _read_homes() -> dict[str, str | None]:
    """Reads from the stub in which module every public name is defined; a folder of modules is in none."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [statement for statement in stub.body if isinstance(statement, ast.ImportFrom)]
    return {alias.name: statement.module for statement in imports for alias in statement.names}


_HOMES = _read_homes()
__all__ = sorted(name for name, module in _HOMES.items() if module is not None)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _HOMES[name]
    if module is None:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# The operators are there as soon as the package is imported; only the command line, whose --help must not wait for
# torch, loads them when it needs them ("-m" stands in argv while `python -m ffattr` imports the package).
if Path(sys.argv[0] if sys.argv else "").name not in ("ffattr", "ffattr.exe", "-m"):
    import_module(f"{__name__}.ops.backends")
