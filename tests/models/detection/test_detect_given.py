"""Models found on what the user passed: of any inputs, in wrappers, with layers that do not attend, with experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from own_modules import Block, HiddenEps, Mine, Skipping, Still, mine
from recording import assert_recomputed, run
from tiny_models import build
from torch import Tensor, nn

import ffattr
import ffattr.models.registry as adapters
from ffattr.errors import UnsupportedModel
from ffattr.models.detection import detect
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


def test_a_norm_under_any_name() -> None:
    model = mine(norm=HiddenEps)
    description, records, mask = run("", model, torch.arange(14).view(2, 7))
    assert_recomputed(description, records, mask)
    assert description.layers[0].norm_before_ff is model.blocks[0].norm2


@pytest.mark.parametrize(
    ("blocks", "numbers", "other"),
    [
        (lambda: [Skipping(True), Skipping(False)], (0,), {1: "Skipping"}),
        (lambda: [Block(), Still(), Block()], (0, 2), {1: "Still"}),
    ],
)
def test_layers_that_do_not_attend_are_left_out(
    blocks: Callable[[], list[nn.Module]], numbers: tuple[int, ...], other: dict[int, str]
) -> None:
    model, ids = Mine(blocks()).double().eval(), torch.arange(14).view(2, 7)
    tiny_models._randomise(model)
    description = resolve(model)
    assert (description.numbers, description.left_out) == (numbers, other)
    attr = ffattr.attribute(model, ids, scopes="all")
    assert attr.layers == numbers
    assert attr.error.max() < 1e-10
    assert torch.equal(ffattr.attribute(model, ids, layers=numbers[-1])["layer"][0], attr["layer"][-1])
    assert ffattr.vectors(model, ids, scope="layer").layers == numbers
    kind = next(iter(other.values()))
    with pytest.raises(UnsupportedModel, match=rf"layer 1 of Mine is a {kind} without attention.*: {numbers[0]}"):
        ffattr.attribute(model, ids, layers=[1])


class Picture(nn.Module):
    """Reads patches of an image of any shape and a class token, by a forward that takes a batch."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.patches, self.start = nn.Conv2d(3, 24, (2, 4), stride=(2, 4)), nn.Parameter(torch.randn(1, 1, 24))
        self.blocks = blocks

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.patches(batch["image"]).flatten(2).mT
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        return self.blocks(x)  # type: ignore[no-any-return]


def test_structure_is_searched_on_what_the_user_passed() -> None:
    """Nothing that could be made up is read by this model."""
    model = Picture(mine().blocks).double().eval()
    with pytest.raises(UnsupportedModel, match="could not be run on a small input"):
        resolve(model)
    image = torch.randn(2, 3, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attr = ffattr.attribute(model, {"image": image}, scopes="all")
    assert attr["layer"].shape == (2, 2, 7, 7)  # six patches and the token before them
    assert attr.tokens == [[str(place) for place in range(7)]] * 2
    assert attr.error.max() < 1e-10
    with pytest.raises(ValueError, match=r"Picture does not run on other \(2, 3\): .*image"):
        ffattr.attribute(model, {"other": image[:, :, 0, 0]})


class Classifier(nn.Module):
    """A model inside another one, which has names of its own for what it reads."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = inner, nn.Linear(40, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head(states[:, 0])  # type: ignore[no-any-return]


def test_a_wrapper_has_the_layers_of_the_model_inside() -> None:
    inner = build("bert")
    given = tiny_models.inputs("bert", padding="right")
    expected = ffattr.attribute(inner, given, scopes="all")
    wrapped = Classifier(inner).double().eval()
    found = ffattr.attribute(wrapped, {"ids": given["input_ids"], "mask": given["attention_mask"]}, scopes="all")
    assert found.arguments["model"] == "bert"
    assert torch.equal(found.mask, expected.mask)
    assert found.tokens == expected.tokens
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found[scope], tile, rtol=0, atol=1e-12)
    for outer in (nn.DataParallel(inner), torch.optim.swa_utils.AveragedModel(inner).eval()):
        assert torch.equal(ffattr.attribute(outer, given)["layer"], ffattr.attribute(inner, given)["layer"])


def test_two_models_inside_are_named() -> None:
    two = nn.ModuleDict({"one": build("bert"), "other": build("vit")})
    with pytest.raises(UnsupportedModel, match=r"not tried.* model.one \(bert\) or model.other \(vit\), with inputs"):
        resolve(two)


@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v3", "granitemoe-shared", "mixtral", "minicpm3"])
def test_mixtures_and_latent_attention(name: str) -> None:
    model = build(name)
    found = detect.describe_by_structure(model)
    for spec, known in zip(found.layers, resolve(model).layers, strict=True):
        of_one, of_other = (dict(one.weights(torch.float64).tensors()) for one in (spec, known))
        assert of_one.keys() == of_other.keys()
        for part, tensor in of_one.items():
            torch.testing.assert_close(tensor, of_other[part], rtol=1e-12, atol=1e-12, msg=part)
        assert (spec.experts, spec.active) == (known.experts, known.active)


def test_a_language_model_with_a_tower_for_images() -> None:
    """The tower makes some of the tokens that the language model reads, and is no part of what is mapped."""

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.words, self.layers = mine().blocks, nn.Embedding(50, 24), mine().blocks

        def forward(self, ids: Tensor, patches: Tensor) -> Tensor:
            return self.layers(torch.cat([self.tower(patches), self.words(ids)], 1))  # type: ignore[no-any-return]

    model = Seeing().double().eval()
    patches = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attr = ffattr.attribute(model, {"ids": torch.tensor([[5, 6, 7]]), "patches": patches})
    assert attr["layer"].shape == (2, 1, 6, 6)
    assert resolve(model).layers[0].module is model.layers[0]


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


class Inline(nn.Module):
    """A feed-forward block with its activation written out, or in a module."""

    def __init__(self, gated: bool, as_module: bool) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(24, 40), nn.Linear(24, 40) if gated else None, nn.Linear(40, 24)
        self.act = Swish() if as_module else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x) if self.gate is None else self.gate(x)
        value = z * torch.sigmoid(2 * z) if self.act is None else self.act(z)
        return self.down(value if self.gate is None else value * self.up(x))


def assert_same_maps(model: nn.Module, plain: nn.Module, ids: Tensor) -> ffattr.Attribution:
    """Asserts that a model has the maps of a plain one with its weights, and returns them."""
    found, expected = (ffattr.attribute(one, ids, scopes="all") for one in (model, plain))
    assert float(found.error.max()) < 1e-10
    for scope in found.scopes:
        torch.testing.assert_close(found[scope], expected[scope], rtol=1e-10, atol=1e-12)
    return found


@pytest.mark.filterwarnings("ignore:ffattr has no closed form")
@pytest.mark.parametrize("gated", [False, True])
def test_an_activation_that_is_written_out(gated: bool) -> None:
    ids = torch.arange(14).view(2, 7)
    inline, module = (mine(ff=lambda as_module=kind: Inline(gated, as_module)) for kind in (False, True))
    module.load_state_dict(inline.state_dict())
    assert_same_maps(inline, module, ids)


class Folded(nn.Module):
    """Heads and sequences on one axis, and no attribute that says how many heads."""

    def __init__(self, heads: int, folded: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self._split, self._folded = nn.Linear(24, 72), nn.Linear(24, 24), (heads, -1), folded

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, self._split).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self._folded:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.out(mixed.reshape(len(x), self._split[0], x.shape[1], -1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_that_nothing_counts(heads: int) -> None:
    ids = torch.arange(14).view(2, 7)
    folded, plain = (mine(attention=lambda kind=kind: Folded(heads, kind)) for kind in (True, False))
    plain.load_state_dict(folded.state_dict())
    found = assert_same_maps(folded, plain, ids)
    assert found["attn_heads"].shape[2] == heads
