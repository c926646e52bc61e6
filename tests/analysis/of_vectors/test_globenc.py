"""GlobEnc's maps, against its formula written out for one token after the other."""

import pytest
import torch
from tiny_models import build, inputs

import ffattr
from ffattr.analysis import globenc_maps, rollout_maps


def test_maps_and_their_products():
    model, given = build("bert"), inputs("bert")
    vectors = ffattr.vectors(model, given, scope=["atb", "atb_ff_res"])
    norms = [layer.output.LayerNorm for layer in model.encoder.layer]
    gains = torch.stack([norm.weight.detach() for norm in norms])
    found = globenc_maps(vectors, gains, norms[0].eps)
    with torch.no_grad():
        outputs = []
        hooks = [norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0])) for norm in norms]
        model(**given)
    for hook in hooks:
        hook.remove()
    values = vectors["atb"].values
    for layer, (norm, stream) in enumerate(zip(norms, outputs, strict=True)):
        for batch, query, key in ((0, 0, 0), (0, 3, 1), (1, 5, 2)):
            one, read = values[layer, batch, query, key], stream[batch, query]
            scale = ((read - read.mean()) ** 2).mean() + norm.eps
            expected = ((one - one.mean()) / scale.sqrt() * norm.weight).norm()
            assert float(found[layer, batch, query, key]) == pytest.approx(float(expected), rel=1e-9)
    product = rollout_maps(found, residual=0, normalise=False)
    assert torch.allclose(product[1, 0], found[1, 0] @ found[0, 0])
    assert not torch.allclose(product[1], rollout_maps(found, residual=0)[1])


def test_what_does_not_fit():
    vectors = ffattr.vectors(build("bert"), inputs("bert"), scope=["atb", "atb_ff_res"])
    with pytest.raises(ValueError, match="expected those of atb and atb_ff_res"):
        globenc_maps({"atb": vectors["atb"]}, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"gains have shape \[1, 4\]"):
        globenc_maps(vectors, torch.ones(1, 4))
