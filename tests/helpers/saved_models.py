"""Small random models in folders, with what makes their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from made_tokenizers import make_tokenizer
from tiny_models import build
from torch import nn


def save_model(folder: Path, name: str, model: nn.Module | None = None, processor: Any = None, **options: Any) -> Path:
    """Saves a small random model, or the one given, with what makes its inputs."""
    target = folder / name
    if not target.exists():
        model = build(name, dtype=torch.float32, **options) if model is None else model
        model.save_pretrained(target)
        (make_tokenizer(pad_token="[PAD]") if processor is None else processor).save_pretrained(target)
    return target
