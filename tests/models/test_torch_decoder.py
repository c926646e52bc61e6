"""PyTorch's own decoders, alone with a memory and beside the encoder that makes it, against a decomposition that is
written out here from the model's own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import _randomise
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
from ffattr.errors import UnsupportedModel
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEADS, OWN, READ = 12, 4, 5, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 20, dropout=0.1, **{"batch_first": True, **options})
    _randomise(layer)
    return layer.double().eval()


def decoder(layers: int = 2, **options: Any) -> nn.TransformerDecoder:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(decoder_layer(**options), layers, norm=nn.LayerNorm(WIDTH))
    _randomise(model)
    return model.double().eval()


def attend(module: Any, x: Tensor, read: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What each token of ``read`` brings to each of ``x``, ``[T, T', d]``, the value bias included, and the bias."""
    weights, shifts = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (
        (given @ weight.T + shift).unflatten(-1, (HEADS, -1))
        for given, weight, shift in zip((x, read, read), weights, shifts, strict=True)
    )
    scores = torch.einsum("ihf,jhf->hij", q, k) / q.shape[-1] ** 0.5
    alpha = (scores if mask is None else scores + mask).softmax(-1)
    brought = torch.einsum("hij,jhf,dhf->ijd", alpha, v, module.out_proj.weight.unflatten(1, (HEADS, -1)))
    return brought, module.out_proj.bias


def normalise(norm: Any, parts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A LayerNorm with its statistics held fixed, of parts ``[T, J, d]`` and their bias ``[T, d]``."""
    whole = parts.sum(1) + bias
    scale = norm.weight / (whole.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    centred, of_bias = parts - parts.mean(-1, keepdim=True), bias - bias.mean(-1, keepdim=True)
    return centred * scale[:, None], of_bias * scale + norm.bias


def feed_forward(layer: Any, parts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Through a ReLU, along a straight path from zero: every neuron passes its share ``relu(z) / z``."""
    z = layer.linear1(parts.sum(1) + bias)
    slope = (z > 0).double()
    through = ((parts @ layer.linear1.weight.T) * slope[:, None]) @ layer.linear2.weight.T
    return through, (layer.linear1(bias) * slope) @ layer.linear2.weight.T + layer.linear2.bias


def write_out(layer: Any, x: Tensor, memory: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The vectors behind a layer, ``[T, T + T', d]``, and their bias."""
    diagonal = torch.eye(len(x), dtype=x.dtype)[..., None] * x
    before = layer.norm_first
    read = layer.norm1(x) if before else x
    own, shift = attend(layer.self_attn, read, read, mask)
    parts, bias = own + diagonal, shift.expand_as(x)
    if not before:
        parts, bias = normalise(layer.norm1, parts, bias)
    whole = parts.sum(1) + bias
    brought, shift = attend(layer.multihead_attn, layer.norm2(whole) if before else whole, memory)
    parts, bias = torch.cat([parts, brought], 1), bias + shift
    if before:
        of_norm = normalise(layer.norm3, parts, bias)
    else:
        parts, bias = of_norm = normalise(layer.norm2, parts, bias)
    through, shift = feed_forward(layer, *of_norm)
    parts, bias = parts + through, bias + shift
    return (parts, bias) if before else normalise(layer.norm3, parts, bias)


def assert_written_out(found: Any, layer: Any, x: Tensor, memory: Tensor, mask: Tensor | None, place: int) -> None:
    parts, bias = write_out(layer, x, memory, mask)
    norms = torch.cat([found["decoder.layer"][place, 0], found["cross.layer"][place, 0]], -1)
    torch.testing.assert_close(norms, parts.norm(dim=-1), rtol=1e-10, atol=1e-12)
    name = next(name for name in found.bias if name.startswith("decoder."))
    torch.testing.assert_close(found.bias[name][place, 0], bias.norm(dim=-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@torch.no_grad()
def test_maps_are_those_written_out(norm_first: bool, batch_first: bool) -> None:
    model = decoder(norm_first=norm_first, batch_first=batch_first)
    x, memory = random(OWN, WIDTH), random(READ, WIDTH, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(OWN, dtype=torch.float64)
    order = (lambda one: one[None]) if batch_first else (lambda one: one[:, None])
    given = {"memory": order(memory), "tgt": order(x), "tgt_mask": mask}
    found = ffattr.attribute(model, given, dtype=torch.float64)
    assert set(found.stacks) == {"decoder", "cross"}
    for place, layer in enumerate(model.layers):
        assert_written_out(found, layer, x, memory, mask, place)
        x = layer(x[None], memory[None], mask)[0] if batch_first else layer(x[:, None], memory[:, None], mask)[:, 0]
    assert float(found.error.max()) < 1e-12


@torch.no_grad()
def test_a_layer_alone_and_its_vectors() -> None:
    layer, x, memory = decoder_layer(), random(1, OWN, WIDTH), random(1, READ, WIDTH, seed=1)
    found = ffattr.vectors(layer, (x, memory), scope=["decoder.layer", "cross.layer"])
    parts = torch.cat([one.values[0, 0] for one in found.values()], -2)
    bias = next(iter(found.values())).bias[0, 0]
    torch.testing.assert_close(parts.sum(-2) + bias, layer(x, memory)[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts, write_out(layer, x[0], memory[0], None)[0], rtol=1e-10, atol=1e-12)
    assert_written_out(ffattr.attribute(layer, (x[0], memory[0])), layer, x[0], memory[0], None, 0)


def test_padding_of_both_sides_changes_nothing() -> None:
    model, x, memory = decoder(), random(2, OWN, WIDTH), random(2, READ, WIDTH, seed=1)
    own, read = torch.zeros(2, OWN, dtype=torch.bool), torch.zeros(2, READ, dtype=torch.bool)
    own[1, 3:], read[1, 2:] = True, True
    masks = {"tgt_key_padding_mask": own, "memory_key_padding_mask": read}
    found = ffattr.attribute(model, {"tgt": x, "memory": memory, **masks}, scopes="all", dtype=torch.float64)
    alone = ffattr.attribute(model, (x[1:, :3], memory[1:, :2]), scopes="all", dtype=torch.float64)
    assert found.stacks["cross"].key_mask is not None
    assert found.stacks["cross"].key_mask.sum(-1).tolist() == [READ, 2]
    assert found.mask.sum(-1).tolist() == [OWN, 3]
    for name, tile in alone.maps.items():
        columns = 3 if name.startswith("decoder") else 2
        torch.testing.assert_close(
            found.maps[name][..., 1:, :3, :columns]
            if "heads" not in name
            else found.maps[name][:, 1:, :, :3, :columns],
            tile,
            rtol=1e-9,
            atol=1e-12,
        )


def test_both_halves_in_one() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 20, batch_first=True)
    _randomise(model)
    model.double().eval()
    src, x = random(2, READ, WIDTH, seed=1), random(2, OWN, WIDTH)
    found = ffattr.attribute(model, {"src": src, "tgt": x}, scopes="all", dtype=torch.float64)
    encoder = ffattr.attribute(model.encoder, src, scopes="all", dtype=torch.float64)
    across = ffattr.attribute(model.decoder, (x, model.encoder(src)), scopes="all", dtype=torch.float64)
    expected = {**{f"encoder.{name}": tile for name, tile in encoder.maps.items()}, **across.maps}
    assert found.maps.keys() == expected.keys()
    for name, tile in expected.items():
        torch.testing.assert_close(found.maps[name], tile, rtol=1e-10, atol=1e-12)
    assert resolve(model).family == "Transformer"


class Captioner(nn.Module):
    """Ids that attend to regions of an image, which nobody would take for the tokens of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.words = nn.Linear(7, WIDTH), nn.Embedding(20, WIDTH)
        self.decoder, self.head = decoder(), nn.Linear(WIDTH, 20)
        self.double().eval()

    def forward(self, regions: Tensor, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.float64)
        return self.head(self.decoder(self.words(ids), self.features(regions), tgt_mask=mask))


@torch.no_grad()
def test_inside_a_model_of_the_users() -> None:
    model, regions, ids = Captioner(), random(1, READ, 7), torch.tensor([[3, 1, 4, 1, 5]])
    found = ffattr.attribute(model, (regions, ids))
    mask = nn.Transformer.generate_square_subsequent_mask(OWN, dtype=torch.float64)
    assert_written_out(found, model.decoder.layers[0], model.words(ids)[0], model.features(regions)[0], mask, 0)
    assert found.stacks["cross"].key_tokens == [[str(place) for place in range(READ)]]


def test_contributions_to_a_decoder_alone() -> None:
    model, x, memory = decoder(), random(1, OWN, WIDTH), random(1, READ, WIDTH, seed=1)
    direction = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    found = ffattr.contributions(model, (x, memory), target=direction, position=-1)
    assert float(found.error.max()) < 1e-10
    assert found.cross_scores is not None
    assert float(found.cross_scores[:, 0].abs().max()) > 1e-3


def test_what_is_refused() -> None:
    model = decoder()
    model.layers[1] = nn.Identity()
    with pytest.raises(UnsupportedModel, match=r"is a Identity, expected nn.TransformerDecoderLayer"):
        resolve(model)
    model.layers[1] = decoder_layer()
    model.layers[1].multihead_attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=8)
    with pytest.raises(UnsupportedModel, match="separate key/value widths"):
        resolve(model)
    model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModel, match="has no layers"):
        resolve(model)
    mixed = nn.Transformer(WIDTH, HEADS, 1, 1, 20, batch_first=True, custom_decoder=decoder(batch_first=False))
    with pytest.raises(UnsupportedModel, match="differ in batch_first"):
        resolve(mixed.eval())


class Home(nn.Module):
    """The same layer, written at home: found by its structure."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.own, self.across = layer.self_attn, layer.multihead_attn
        self.norms = nn.ModuleList([layer.norm1, layer.norm2, layer.norm3])
        self.up, self.down = layer.linear1, layer.linear2

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.norms[0](x + self.own(x, x, x)[0])
        x = self.norms[1](x + self.across(x, memory, memory)[0])
        return self.norms[2](x + self.down(F.relu(self.up(x))))  # type: ignore[no-any-return]


class HomeDecoder(nn.Module):
    def __init__(self, theirs: nn.TransformerDecoder) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Home(layer) for layer in theirs.layers)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, memory)
        return x


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_written_at_home_has_the_same_maps(batch_first: bool) -> None:
    theirs = decoder(batch_first=batch_first)
    x, memory = random(2, OWN, WIDTH), random(2, READ, WIDTH, seed=1)
    given = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
    found = ffattr.attribute(HomeDecoder(theirs).eval(), given, scopes="all", dtype=torch.float64)
    expected = ffattr.attribute(theirs, given, scopes="all", dtype=torch.float64)
    assert found.maps.keys() == expected.maps.keys()
    for name, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[name], tile, rtol=1e-10, atol=1e-12)
