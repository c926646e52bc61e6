"""ffattr: how much each input token contributes to each output token of every Transformer layer, FF block included.

attr = ffattr.attribute(model, inputs, scopes="layer")
attr.maps["atb_ff_res_ln"]  # [layers, batch, query, key]
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .decomposition.integrated_gradients import GaussLegendre, Riemann
    from .decomposition.sketch import Sketch
    from .engine.plan import Plan
    from .errors import (
        ArchitectureMismatch,
        BackendUnavailable,
        CaptureError,
        FfattrError,
        NonFiniteError,
        OutOfMemory,
        UnsupportedModel,
    )
    from .models.registry import known_models, register_adapter
    from .models.spec.layer import LayerSpec
    from .models.spec.weights import Columns
    from .pipeline.attribute import attribute
    from .pipeline.plan import plan
    from .pipeline.vectors import Vectors, vectors
    from .results import Attribution, StackedAttribution, load
    from .results.keep import Dense, Pool, Reduce, Rows, Top, TopK

# Loaded at first use, see the end.
_HOME = {
    "models.registry": ("known_models", "register_adapter"),
    "pipeline.attribute": ("attribute",),
    "pipeline.plan": ("plan",),
    "pipeline.vectors": ("Vectors", "vectors"),
    "errors": (
        "ArchitectureMismatch",
        "BackendUnavailable",
        "CaptureError",
        "FfattrError",
        "NonFiniteError",
        "OutOfMemory",
        "UnsupportedModel",
    ),
    "decomposition.integrated_gradients": ("GaussLegendre", "Riemann"),
    "results.keep": ("Dense", "Pool", "Reduce", "Rows", "Top", "TopK"),
    "models.spec.layer": ("LayerSpec",),
    "models.spec.weights": ("Columns",),
    "results": ("Attribution", "StackedAttribution", "load"),
    "engine.plan": ("Plan",),
    "decomposition.sketch": ("Sketch",),
}
_SUBPACKAGES = ("analysis", "ops", "plot", "report", "study")
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ArchitectureMismatch",
    "Attribution",
    "BackendUnavailable",
    "CaptureError",
    "Columns",
    "Dense",
    "FfattrError",
    "GaussLegendre",
    "LayerSpec",
    "NonFiniteError",
    "OutOfMemory",
    "Plan",
    "Pool",
    "Reduce",
    "Riemann",
    "Rows",
    "Sketch",
    "StackedAttribution",
    "Top",
    "TopK",
    "UnsupportedModel",
    "Vectors",
    "__version__",
    "attribute",
    "known_models",
    "load",
    "plan",
    "register_adapter",
    "vectors",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    module = _MODULE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})


# The operators are there as soon as the package is imported; only the command line, whose --help must not wait for
# torch, loads them when it needs them ("-m" stands in argv while `python -m ffattr` imports the package).
if Path(sys.argv[0] if sys.argv else "").name not in ("ffattr", "ffattr.exe", "-m"):
    import_module(f"{__name__}.ops.backends")
