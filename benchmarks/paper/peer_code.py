"""The published code of others, imported from a checkout as it is: what their imports name and is no more, or is not
needed, is stood in for while they are imported."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers
from torch import Tensor, nn

__all__ = ["load_alti", "load_decompx", "load_globenc", "load_norm_analysis"]


class OldPreTrainedModel(nn.Module):
    """What DecompX's BERT takes from the base class of the transformers that it was written for."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        """Leaves the weights alone: others are loaded."""

    def get_head_mask(self, head_mask: None, layers: int) -> list[None]:
        return [None] * layers

    def get_extended_attention_mask(self, mask: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
        return (1.0 - mask[:, None, None, :].to(torch.get_default_dtype())) * torch.finfo(torch.get_default_dtype()).min


@contextmanager
def stand_in(modules: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Gives imports of these modules names that they hold, and nothing else."""
    before = {name: sys.modules.get(name) for name in modules}
    for name, content in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


_OLD = dict.fromkeys(("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"))
"""What ``transformers.modeling_utils`` had at that time besides the class of models."""


def _open_package(name: str, folder: Path, needed: str) -> None:
    """Makes a folder importable as a package. Raises FileNotFoundError where it lacks the file ``needed``."""
    if not (folder / needed).is_file():
        raise FileNotFoundError(f"{folder} has no {needed}; expected it in a checkout of their repository")
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def load_decompx(checkout: Path) -> tuple[Any, Any]:
    """Imports its module of BERT and that of its settings."""
    _open_package("decompx", checkout / "src", "modeling_bert.py")
    with stand_in({"transformers.modeling_utils": {"PreTrainedModel": OldPreTrainedModel, **_OLD}}):
        return import_module("decompx.modeling_bert"), import_module("decompx.decompx_utils")


def load_globenc(checkout: Path) -> Any:
    """Imports its module of BERT."""
    _open_package("globenc", checkout / "src", "modeling/modeling_bert.py")
    with stand_in({"transformers.modeling_utils": {"PreTrainedModel": OldPreTrainedModel, **_OLD}}):
        return import_module("globenc.modeling.modeling_bert")


def load_norm_analysis(checkout: Path) -> Any:
    """Imports the module of BERT from its copy of transformers 3, whose other modules are stood in for."""
    name = "norm_analysis"
    _open_package(name, checkout / "emnlp2021" / "transformers" / "src" / "transformers", "modeling_bert.py")
    swish = nn.functional.silu
    acts = {"gelu": nn.functional.gelu, "gelu_new": transformers.activations.NewGELUActivation(), "swish": swish}

    def decorate(*_: Any, **__: Any) -> Any:
        return lambda decorated: decorated

    words = ("add_code_sample_docstrings", "add_start_docstrings", "add_start_docstrings_to_callable")
    parts = {
        f"{name}.activations": acts,
        f"{name}.configuration_bert": {"BertConfig": transformers.BertConfig},
        f"{name}.file_utils": dict.fromkeys(words, decorate),
        f"{name}.modeling_utils": {"PreTrainedModel": OldPreTrainedModel, **_OLD},
    }
    with stand_in(parts):
        return import_module(f"{name}.modeling_bert")


def load_alti(checkout: Path) -> tuple[Any, Any]:
    """Imports what decomposes a model, and what makes maps of it; data sets, notebooks and pictures are left out."""
    _open_package("src", checkout / "src", "contributions.py")
    settings = import_module("yaml").safe_load((checkout / "src" / "config.yaml").read_text())
    missing = (
        "captum",
        "captum.attr",
        "datasets",
        "ipywidgets",
        "dotenv",
        "seaborn",
        "IPython",
        "IPython.core.display",
    )
    unused = {name: MagicMock() for name in missing}
    before = {name: sys.modules.get(name) for name in unused}
    sys.modules.update(unused)
    try:
        with stand_in({"pyaml_env": {"parse_config": lambda _: settings}}):
            return import_module("src.contributions"), import_module("src.utils_contributions")
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
