"""What a run is: everything that its bytes depend on, in ``_run.json``, and its plan, in ``_plan.json``.

Both are written once, when a run begins. Whoever works on it reads them; a rerun that would be another run is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..engine.machine_rates import Rates, calibrated
from ..errors import FfattrError
from ..machine import replacing
from ..ops import backends
from ..selection import parse_indices
from .documents import Shard, Source, find_sources, plan_shards

__all__ = ["Options", "Run", "RunMismatch", "begin_run", "describe_machine", "read_run"]

_RUN, _PLAN = "_run.json", "_plan.json"
_FORMAT = 1
_PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "numpy", "pandas")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".h5", ".msgpack")
_NOMINAL = Rates(
    product=5e10,
    attention=9e10,
    weights=9e7,
    features=3e10,
    gram=5e9,
    form=3e10,
    slope=2e8,
    gated_slope=1e8,
    mixing=7e9,
    direct=2.6e11,
    operator=1.2e11,
    fresh=1e9,
    packs=350.0,
    blocks=600.0,
    calls=4000.0,
)
"""What methods are chosen by where `ffattr bench --calibrate` has not run: rates of one core with a matrix unit. A
measurement would choose now this method and now that one, and their last bits differ."""


class RunMismatch(FfattrError, ValueError):
    """The folder holds the run of another model, other inputs, options or versions."""


@dataclass(frozen=True)
class Options:
    """What the bytes of a run depend on and a user chooses; see `run_corpus`."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ("documents", "pairs", "tokens")
    scopes: tuple[str, ...] = ("layer",)
    layers: str | None = None
    pairs: int = 10
    target: str | None = None
    long: str = "error"
    max_tokens: int | None = None
    batch_tokens: int | None = None
    shard_docs: int = 1024
    threads: int = 1
    spacy: str | None = None

    def __post_init__(self) -> None:
        for name in ("pairs", "shard_docs", "threads", "max_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.long not in ("error", "cut", "window"):
            raise ValueError(f"long is {self.long!r}, expected 'error', 'cut' or 'window'")
        if self.layers is not None:
            parse_indices(self.layers)
        if ("scores" in self.keep) != (self.target is not None):
            raise ValueError("the table 'scores' and a target go together: name both or none")


@dataclass(frozen=True)
class Run:
    """A run in its ``folder``: the ``model``, its ``sources``, ``options``, ``rates`` and ``shards``."""

    folder: Path
    model: str
    sources: tuple[Source, ...]
    options: Options
    rates: Rates
    machine: Mapping[str, str]
    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        return sum(shard.count for shard in self.shards)


def begin_run(folder: Path, model: str, inputs: Sequence[str], options: Options) -> Run:
    """Writes down what the run is, or checks that it is the one that ``folder`` holds.

    Raises `RunMismatch` where it is another one, and what `find_sources` and `plan_shards` raise.
    """
    sources = find_sources(inputs)
    described = _describe(model, sources, options)
    file = folder / _RUN
    if file.exists():
        _compare(json.loads(file.read_text(encoding="utf-8")), described, folder)
        return read_run(folder)
    shards = plan_shards(sources, options.shard_docs, options.text, options.id)
    folder.mkdir(parents=True, exist_ok=True)
    if any(not one.name.startswith(("_", ".")) for one in folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} holds other files and no {_RUN}: expected a new or empty folder")
    _write_json(folder / _PLAN, {"shards": [list(asdict(shard).values()) for shard in shards]})
    _write_json(file, described)  # last: with it the run is there
    return read_run(folder)


def read_run(folder: Path) -> Run:
    """Returns the run that a folder holds. Raises FileNotFoundError where there is none, ValueError for a newer one."""
    file = folder / _RUN
    if not file.exists():
        raise FileNotFoundError(f"{str(folder)!r} holds no run of `ffattr corpus`: there is no {_RUN}")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("format") != _FORMAT:
        raise ValueError(f"{str(file)!r} has format {found.get('format')}, this ffattr reads {_FORMAT}")
    plan = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found["options"].items()
    }
    return Run(
        folder,
        found["model"]["name"],
        tuple(Source(**source) for source in found["inputs"]),
        Options(**options),
        Rates(**found["rates"]),
        found["machine"],
        tuple(Shard(*shard) for shard in plan["shards"]),
    )


def describe_machine() -> dict[str, str]:
    """Returns what of this machine and its programs the bytes depend on."""
    built = dict(backends.build_info())
    names = ("instruction set", "float32 by", "bfloat16 by")
    found: dict[str, str] = {name: built[name] for name in names if name in built}
    found["torch instructions"] = torch.backends.cpu.get_cpu_capability()
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["ffattr"] = __version__
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _describe(model: str, sources: Sequence[Source], options: Options) -> dict[str, Any]:
    cpu = torch.device("cpu")
    known = calibrated("cpu", torch.float32, cpu, options.threads)
    return {
        "format": _FORMAT,
        "model": _describe_model(model),
        "inputs": [asdict(source) for source in sources],
        "options": json.loads(json.dumps(asdict(options))),
        "rates": asdict(known or _NOMINAL),
        "machine": describe_machine(),
    }


def _describe_model(name: str) -> dict[str, Any]:
    """Returns the model's name or place, a digest of its configuration and the sizes of its weights."""
    path = Path(name)
    if path.is_file():
        return {"name": os.path.abspath(name), "weights": {path.name: path.stat().st_size}}
    if path.is_dir():
        config = path / "config.json"
        digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.exists() else ""
        weights = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.suffix in _WEIGHTS}
        return {"name": os.path.abspath(name), "config": digest, "weights": weights}
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise FileNotFoundError(f"no model at {name!r}: there is no such file or folder")
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"name": name, "config": digest, "weights": {}, "commit": getattr(config, "_commit_hash", None)}


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Raises `RunMismatch` naming the first thing that differs."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    for name in (*before, *after):
        if before.get(name) != after.get(name):
            raise RunMismatch(
                f"{str(folder)!r} holds another run: {name} was {before.get(name)!r}, and is {after.get(name)!r} now. "
                "Go on with what it was, or use another output folder"
            )


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flatten(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        yield f"number of {name}", len(value)
        for number, part in enumerate(value):
            yield from _flatten(part, f"{name}[{number}]")
    else:
        yield name, value


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    with replacing(file, durable=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
