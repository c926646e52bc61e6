"""Sets ffattr beside the published code of others, where their settings mean the same, and prints the largest
differences and the times.

    python benchmarks/paper/compare_peers.py decompx|globenc|norms|alti CHECKOUT [--tokens 24] [--threads 1] [--write]

CHECKOUT is a folder with their repository, none of which is kept here. Both compute in float64, on MiniLM-L6 with a
random head of two classes: the weights are those of a trained model, only the classes mean nothing.

decompx  github.com/mohsenfayyaz/DecompX (Modarressi et al., ACL 2023). Layer by layer: the norms of its vectors after
         each of its parts, with slopes through the origin, which are Integrated Gradients from zero (it divides by
         z + 1e-12, so the last digits differ). Through all layers: what each token gives to the classes, with its token
         for biases. It leaves the first layer's value bias with the tokens, so it is compared with the flow of the
         first layer, which does as well, summed over the rows.
globenc  github.com/mohsenfayyaz/GlobEnc (Modarressi et al., NAACL 2022). The map of each layer and their product,
         beside `ffattr.analysis.globenc_maps` and `rollout_maps`; and how far row-normalised products of ``layer`` are
         from them, which are another method.
norms    github.com/gorokoba560/norm-analysis-of-transformer (Kobayashi et al., EMNLP 2021). Norms per head, of all
         heads, with the residual connection and behind the norm, and the mixing ratios at the last three.
alti     github.com/mt-upc/transformer-contributions (Ferrando et al., EMNLP 2022). The map of each layer and their
         product, beside ``reduce="alti"`` and `rollout_maps`; and norms of the vectors. torch adds 1e-6 to each
         dimension of a difference before it takes a distance (`pairwise_distance`): as it is, and with eps=0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpu"))
from kept_figures import add_figures, describe_machine
from models import minilm
from peer_code import load_alti, load_decompx, load_globenc, load_norm_analysis
from rich.console import Console
from rich.table import Table
from texts import SENTENCES
from torch import Tensor, nn

import ffattr

_SCOPES = {
    "attention": "attn",
    "res1": "attn_res",
    "LN1": "atb",
    "FFN": "atb_ff",
    "res2": "atb_ff_res",
    "encoder": "layer",
}
"""What DecompX calls the scopes."""


def compare_globenc(checkout: Path, tokens: int) -> list[Comparison]:
    """Compares maps layer by layer, and their product."""
    modelling = load_globenc(checkout)
    model, tokenizer = make_classifier()
    bert = model.bert
    given = tokenizer(" ".join(SENTENCES), return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    encoder = modelling.BertEncoder(bert.config).eval()
    encoder.load_state_dict(bert.encoder.state_dict())
    gains = torch.stack([layer.output.LayerNorm.weight.detach() for layer in bert.encoder.layer])

    nothing = torch.zeros(1, 1, 1, given.shape[1])  # is masked

    def decompose() -> tuple[Tensor, Tensor]:
        maps: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda _, given, found: maps.append(found[1])) for layer in encoder.layer]
        with torch.no_grad():
            *_, product = encoder(bert.embeddings(given), nothing, output_globenc=True, return_dict=False)
        for hook in hooks:
            hook.remove()
        return torch.stack(maps)[:, 0], product[0]

    def compute() -> Any:
        vectors = ffattr.vectors(bert, given, scope=["atb", "atb_ff_res"])
        maps = ffattr.analysis.globenc_maps(vectors, gains, bert.config.layer_norm_eps)
        return maps[:, 0], ffattr.analysis.rollout_maps(maps, residual=0, normalise=False)[-1, 0]

    (their_maps, their_product), theirs = take_time(decompose)
    (our_maps, our_product), ours = take_time(compute)
    rolled = ffattr.analysis.rollout_maps(ffattr.attribute(bert, given))[-1, 0]
    ranks = ffattr.analysis.spearman(rolled[0], their_product[0])
    return [
        Comparison("maps of layers", relative_difference(our_maps, their_maps), ours, theirs),
        Comparison("their product", relative_difference(our_product, their_product), ours, theirs),
        Comparison("1 - rank correlation of [CLS] to rollout of layer, another method", 1 - ranks, ours, theirs),
    ]


def compare_norms(checkout: Path, tokens: int) -> list[Comparison]:
    """Compares norms and mixing ratios of the attention block."""
    modelling = load_norm_analysis(checkout)
    model, tokenizer = make_classifier()
    bert = model.bert
    given = tokenizer(" ".join(SENTENCES), return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    bert.config.is_decoder = False
    encoder = modelling.BertEncoder(bert.config).eval()
    encoder.load_state_dict(bert.encoder.state_dict())
    nothing, layers = torch.zeros(1, 1, 1, given.shape[1]), bert.config.num_hidden_layers
    asked = {"output_attentions": True, "output_norms": True}

    def decompose() -> list[Tensor]:
        with torch.no_grad():
            *_, norms = encoder(bert.embeddings(given), nothing, [None] * layers, **asked)
        return [torch.stack(one)[:, 0] for one in zip(*norms, strict=True)]

    def compute() -> tuple[Any, list[Any]]:
        vectors = ffattr.vectors(bert, given, scopes=scopes)
        ratios = [ffattr.analysis.mixing_ratio(vectors[scope])["ratio"] for scope in scopes]
        return ffattr.attribute(bert, given, scopes=["attn_heads", *scopes]), ratios

    scopes = ["attn", "attn_res", "atb"]
    found, theirs = take_time(decompose)
    (attr, ratios), ours = take_time(compute)
    both = list(zip(["attn_heads", *scopes], found, strict=False))
    norms = [(f"norms at {scope}", relative_difference(attr[scope][:, 0], one)) for scope, one in both]
    own = [torch.tensor(one.to_numpy()).view(layers, -1) for one in ratios]
    mixed = [
        (f"mixing ratio at {scope}", relative_difference(mine, one))
        for scope, mine, one in zip(scopes, own, found[4:], strict=True)
    ]
    return [Comparison(name, difference, ours, theirs) for name, difference in norms + mixed]


def compare_alti(checkout: Path, tokens: int) -> list[Comparison]:
    """Compares maps layer by layer, and their product."""
    modelling, tools = load_alti(checkout)
    model, tokenizer = make_classifier()
    model.set_attn_implementation("eager")  # which returns weights
    given = tokenizer(" ".join(SENTENCES), return_tensors="pt", truncation=True, max_length=tokens)
    wrapped = modelling.ModelWrapper(model)

    def decompose() -> tuple[Tensor, Tensor, Tensor]:
        *_, found = wrapped(given)
        whole = found["resultants"].norm(p=1, dim=-1)
        maps = tools.normalize_contributions(found["contributions"], scaling="min_sum", resultant_norm=whole)
        return maps, tools.compute_joint_attention(maps)[-1], found["transformed_vectors_norm"]

    def compute() -> tuple[Tensor, Tensor, Tensor]:
        attr = ffattr.attribute(model.bert, given, scopes="atb", reduce="alti")
        norms = ffattr.attribute(model.bert, given, scopes="atb")
        return attr["atb"][:, 0], ffattr.analysis.rollout_maps(attr, "atb")[-1, 0], norms["atb"][:, 0]

    theirs, of_theirs = take_time(decompose)
    with mock.patch.object(modelling.F, "pairwise_distance", partial(torch.nn.functional.pairwise_distance, eps=0)):
        plain = decompose()
    ours, of_ours = take_time(compute)
    names = ("maps of layers", "their product", "norms of the vectors")
    both = [*zip(names, ours, theirs, strict=True)]
    both += [(f"{name}, eps=0", *pair) for name, *pair in zip(names[:2], ours, plain, strict=False)]
    return [Comparison(name, relative_difference(mine, other), of_ours, of_theirs) for name, mine, other in both]


def make_classifier() -> tuple[Any, Any]:
    """MiniLM with a random head, in float64, and its tokenizer."""
    loaded = minilm()
    config = loaded.model.config
    config.num_labels = 2
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval().double()
    model.bert.load_state_dict(loaded.model.double().state_dict(), strict=False)
    nn.init.normal_(model.classifier.bias)
    return model, loaded.tokenizer


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@dataclass(frozen=True)
class Comparison:
    """``difference``: the largest one, relative to the largest number; seconds of processor time of both."""

    name: str
    difference: float
    ours: float
    theirs: float


def take_time(compute: Callable[[], Any]) -> tuple[Any, float]:
    """What the second run computes, and the seconds of processor time that it takes."""
    compute()
    began = time.process_time()
    return compute(), time.process_time() - began


def compare_decompx(checkout: Path, tokens: int) -> list[Comparison]:
    """Compares maps layer by layer, and contributions through all layers."""
    modelling, settings = load_decompx(checkout)
    model, tokenizer = make_classifier()
    given = tokenizer(" ".join(SENTENCES), return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    theirs = modelling.BertForSequenceClassification(model.config).eval()
    missing = theirs.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert all("position_ids" in name for name in missing), missing
    same = {
        "include_bias_token": True,
        "bias_decomp_type": None,
        "FFN_approx_type": "GeLU_ZO",
        "tanh_approx_type": "ZO",
        "output_all_layers": True,
    }

    def decompose(**options: Any) -> Any:
        with torch.no_grad():
            config = settings.DecompXConfig(**same, **options)
            return theirs(given, return_dict=False, decompx_config=config)

    return [*_compare_layers(model, given, decompose), *_compare_classes(model, given, decompose)]


def _compare_layers(model: Any, ids: Tensor, decompose: Callable[..., Any]) -> Iterator[Comparison]:
    asked = {f"output_{name}": "vector" for name in _SCOPES}
    outputs, theirs = take_time(lambda: decompose(include_classifier_w_pooler=False, **asked))
    attr, ours = take_time(lambda: ffattr.attribute(model, ids, scopes=list(_SCOPES.values())))
    for name, scope in _SCOPES.items():
        vectors = [one[..., : ids.shape[1], :] for one in getattr(outputs[-1], name)]  # without their token for biases
        norms = torch.stack([one[0].norm(dim=-1) for one in vectors])
        yield Comparison(f"norms at {scope}", relative_difference(attr[scope][:, 0], norms), ours, theirs)


def _compare_classes(model: Any, ids: Tensor, decompose: Callable[..., Any]) -> Iterator[Comparison]:
    outputs, theirs = take_time(lambda: decompose(aggregation="vector"))
    c, ours = take_time(lambda: ffattr.contributions(model, ids, target=[0, 1], flow=True, value_bias="token"))
    classes = next(one.classifier for one in outputs if getattr(one, "classifier", None) is not None)[0].T
    given = c.flow[:, 0, 0].sum(-2)
    biases = c.value[:, 0] - given.sum(-1)
    yield Comparison("what tokens give to classes", relative_difference(given, classes[:, :-1]), ours, theirs)
    yield Comparison("what biases give", relative_difference(biases, classes[:, -1]), ours, theirs)


PEERS = {"decompx": compare_decompx, "globenc": compare_globenc, "norms": compare_norms, "alti": compare_alti}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=tuple(PEERS))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/peers.json")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.set_default_dtype(torch.float64)  # DecompX makes some of its tensors in the default one
    title = f"{chosen.peer}, {chosen.tokens} tokens"
    table = Table("compared", "largest relative difference", "ffattr, s", "theirs, s", title=title)
    found = PEERS[chosen.peer](chosen.checkout, chosen.tokens)
    for one in found:
        table.add_row(one.name, f"{one.difference:.1e}", f"{one.ours:.3f}", f"{one.theirs:.3f}")
    Console().print(table)
    if chosen.write:
        compared = [asdict(one) for one in found]
        about = describe_machine(chosen.threads, transformers=transformers.__version__, compared=compared)
        add_figures("peers", f"{chosen.peer}, {chosen.tokens} tokens", about)


if __name__ == "__main__":
    main()
