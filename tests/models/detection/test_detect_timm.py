"""Vision Transformers of timm are found by their structure. Skipped where timm is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ffattr

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("deit3_small_patch16_224", 1),
        ("vit_small_patch16_dinov3", 5),
        ("eva02_tiny_patch14_224", 1),
        ("beit_base_patch16_224", 1),
    ],
)
def test_layers_are_reproduced(name: str, added: int) -> None:
    """``added``: tokens beside those of the 16 patches, for the class, distillation and registers."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False, **SIZES).eval().double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # nothing hides behind zeros
    given = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    attr = ffattr.attribute(model, given, scopes=["atb", "layer"])
    assert attr["layer"].shape == (2, 2, 16 + added, 16 + added)
    assert attr.error.max() < 1e-9
    exact = ffattr.attribute(model, given, scopes=["atb", "layer"], backend="reference")
    for scope in attr.scopes:
        torch.testing.assert_close(attr[scope], exact[scope], rtol=0, atol=1e-9)
