"""The gain of a norm beside what the network writes."""

import pytest
import torch
from tiny_models import build, inputs

import ffattr
from ffattr.analysis import ff_energy, gain_balance, spearman


def test_each_dimension_has_its_gain_and_what_is_written():
    model = build("bert")
    vectors = [ffattr.vectors(model, inputs("bert"), scope="atb_ff")]
    gains = torch.stack([layer.output.LayerNorm.weight.detach() for layer in model.encoder.layer])
    found = gain_balance(vectors, gains)
    energy = ff_energy(vectors)
    for layer, (gain, of_layer) in enumerate(zip(gains, energy, strict=True)):
        rows = found[found["layer"] == layer]
        assert rows["dimension"].tolist() == list(range(len(gain)))
        assert rows["gain"].to_numpy() == pytest.approx(gain.abs().numpy())
        assert rows["ff"].to_numpy() == pytest.approx(of_layer.sqrt().numpy())
        assert set(rows["rho"]) == {spearman(gain.abs().double(), of_layer)}
    one = gain_balance(vectors, gains[0])
    assert one[one["layer"] == 1]["gain"].to_numpy() == pytest.approx(gains[0].abs().numpy())
    with pytest.raises(ValueError, match=r"gains have shape \[3\], expected"):
        gain_balance(vectors, torch.ones(3))
