"""The analyses of `ffattr.analysis` together, of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..analysis import (
    AmplifiedPairs,
    Categories,
    ChangeSample,
    Several,
    TokenSummary,
    amplified_pairs,
    cancellation,
    category_rates,
    contextualization_change,
    mixing_ratio,
    norm_balance,
    rollout,
    token_summary,
)
from ..models.registry import ModelDescription, resolve
from ..pipeline.attribute import attribute
from ..pipeline.vectors import Vectors, vectors
from ..results import Attribution, StackedAttribution
from ..results.keep import Reduce

if TYPE_CHECKING:
    import pandas

__all__ = ["Study", "add_examples", "of_maps", "of_model"]

_OF_VECTORS = ("queries", "ig", "baseline", "value_bias", "dtype")  # options that `vectors` shares with `attribute`
_MOST_ROLLED = 512  # tokens: beyond, a table of the pairs of rollout is of no use to anybody


@dataclass
class Study:
    """Holds what was found of one model (or file) ``name``: ``frames`` by the name of the analysis; ``left_out`` says
    why others are missing; ``example`` are whole maps of one text, to draw.

    >>> study = ffattr.study.of_maps("tiny", attr)
    >>> study.add("shares", lambda: ffattr.analysis.token_summary(attr, "attn"))  # one more to write
    >>> study.frames["shares"]["layer"].nunique()
    3
    """

    name: str
    frames: dict[str, pandas.DataFrame] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    example: Attribution | None = None

    def add(self, name: str, analysis: Callable[[], pandas.DataFrame]) -> None:
        """Adds the frame of an analysis, or why there is none."""
        try:
            found = analysis()
        except ValueError as error:
            self.left_out[name] = str(error)
            return
        if len(found):
            self.frames[name] = found
        else:  # no two tokens in any text, or a parallel block, which brings nothing to other tokens
            self.left_out[name] = "there is no pair of different tokens that it could be of"


def of_maps(name: str, attribution: Attribution, *, k: int = 50, categories: Categories | None = None) -> Study:
    """Makes every analysis that maps which were kept allow.

    k: how many pairs of each layer are the most amplified ones. categories: of pairs; None: those read off tokens.
    Raises ValueError where they allow none.

    >>> study = ffattr.study.of_maps("tiny", attr, k=5)
    >>> list(study.frames)
    ['contextualization_change', 'amplified_pairs', 'amplified_categories', 'token_summary', 'rollout']
    """
    if not isinstance(name, str) or not isinstance(attribution, Attribution):
        raise TypeError(
            f"of_maps({name!r}, a {type(attribution).__name__}), expected a name and what ffattr.attribute returned"
        )
    if isinstance(attribution, StackedAttribution):
        raise ValueError(
            f"{name} has maps of an encoder and a decoder: analyse one of them, attr.stacks[name], for "
            f"{', '.join(attribution.stacks)}"
        )
    if len(set(attribution.layers)) < len(attribution.layers):
        raise ValueError(f"{name} has the layers {list(attribution.layers)}, expected each once")
    categories = Categories() if categories is None else categories
    study = Study(name, example=attribution)
    study.add("contextualization_change", lambda: contextualization_change(attribution))
    study.add("amplified_pairs", lambda: amplified_pairs(attribution, k, categories=categories))
    _add_categories(study, attribution, categories)
    study.add("token_summary", lambda: token_summary(attribution))
    _add_rollout(study, attribution)
    if not study.frames:
        raise ValueError(f"nothing can be said of {name}: {next(iter(study.left_out.values()))}")
    return study


def of_model(
    name: str,
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    k: int = 50,
    categories: Categories | None = None,
    detailed: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Study:
    """Analyses a model on a corpus in one pass that keeps no maps; then, on the first ``detailed`` texts, adds what
    takes vectors (mixing ratio, cancellation, balance of norms).

    Rollout and the maps to draw are of one of the first texts, of about 100 characters. ``options`` are arguments of
    `ffattr.attribute`. Raises ValueError for a model with an encoder and a decoder and for a text that is longer than
    the model's positions, and what `ffattr.attribute` raises.

    >>> study = ffattr.study.of_model("tiny", model, ["The cat sat.", "Dogs barking."], tokenizer, k=5, detailed=1)
    >>> study.frames["cancellation"]["order"].unique().tolist()
    ['ff', 'gain', 'random']
    """
    description = resolve(model)
    if description.stacks:
        raise ValueError(
            f"{name} has an encoder and a decoder: map them with `attribute`, and analyse each of its stacks"
        )
    if not texts:
        raise ValueError("the corpus has no text")
    _check_lengths(name, texts, tokenizer, description.max_positions)
    categories = Categories() if categories is None else categories
    scopes = [scope for scope in description.layers[0].own_scopes if scope.axis is None]
    changes, pairs, tokens = ChangeSample(), AmplifiedPairs(k), TokenSummary()
    collected = Reduce(Several(changes, pairs, tokens))
    options = {"tokenizer": tokenizer, "scopes": [scope.name for scope in scopes], **options}
    attribution = attribute(model, list(texts), keep=collected, progress=progress, **options)
    study = Study(name)
    study.add("contextualization_change", changes.contextualization_change)
    study.add("amplified_pairs", lambda: pairs.frame(attribution, categories))
    _add_categories(study, attribution, categories)
    study.add("token_summary", lambda: tokens.frame(attribution))
    add_examples(study, model, texts, detailed=detailed, **options)
    return study


def add_examples(study: Study, model: nn.Module, texts: Sequence[str], *, detailed: int = 8, **options: Any) -> None:
    """Adds to what was found of a corpus, whose first texts these are, what it takes whole maps or vectors to see.

    Rollout and the maps to draw are of one of the first 20, of about 100 characters; mixing ratio, cancellation and
    balance of norms of the first ``detailed``. ``options`` are arguments of `ffattr.attribute`, the tokenizer among
    them. Raises what `ffattr.attribute` raises.

    >>> study = ffattr.study.Study("tiny")
    >>> ffattr.study.add_examples(study, model, ["The cat sat."], tokenizer=tokenizer, detailed=1)
    >>> list(study.frames)
    ['rollout', 'mixing_ratio', 'cancellation', 'norm_balance']
    """
    description = resolve(model)
    scopes = [scope for scope in description.layers[0].own_scopes if scope.axis is None]
    options = {"scopes": [scope.name for scope in scopes], **options}
    shown = min(range(min(len(texts), 20)), key=lambda number: abs(len(texts[number]) - 100))
    study.example = attribute(model, [texts[shown]], **options)
    _add_rollout(study, study.example, shown)
    if detailed:
        behind_attention = [scope.name for scope in scopes if scope.point not in ("attn", "attn_res")]
        given = {option: options[option] for option in ("tokenizer", *_OF_VECTORS) if option in options}

        def read_layer(layer: int) -> dict[str, Vectors]:
            return vectors(model, list(texts[:detailed]), scope=behind_attention, layers=layer, **given)

        _add_detailed(study, description, study.example.layers, read_layer)


def _check_lengths(name: str, texts: Sequence[str], tokenizer: Any, most: int | None) -> None:
    """Raises ValueError for a text of more tokens than the model has positions: of many, it says which one."""
    for number, text in enumerate(texts if most is not None else ()):
        tokens = len(tokenizer(text)["input_ids"])
        if most is not None and tokens > most:
            raise ValueError(
                f"text {number} ({text[:40]!r}...) has {tokens} tokens, but {name} has {most} learned positions: cut "
                "it into shorter ones"
            )


def _add_categories(study: Study, attribution: Attribution, categories: Categories) -> None:
    if "amplified_pairs" in study.frames:
        pairs = study.frames["amplified_pairs"]
        study.add("amplified_categories", lambda: category_rates(pairs, attribution, categories))


def _add_rollout(study: Study, attribution: Attribution, first: int = 0) -> None:
    """Adds rollout up to the last layer, without and with feed-forward blocks. ``first`` numbers the first sequence."""
    if attribution.mask.shape[1] > _MOST_ROLLED:
        study.left_out["rollout"] = f"{attribution.mask.shape[1]} tokens are too many for a table of pairs"
        return

    def roll_to_last() -> pandas.DataFrame:
        scopes = dict.fromkeys(scope for scope in ("atb", attribution.scopes[-1]) if scope in attribution.scopes)
        found = rollout(attribution, list(scopes))
        return found[found["layer"] == attribution.layers[-1]].assign(batch=lambda rows: rows["batch"] + first)

    study.add("rollout", roll_to_last)


def _add_detailed(
    study: Study, description: ModelDescription, layers: Sequence[int], read_layer: Callable[[int], dict[str, Vectors]]
) -> None:
    """Adds what takes the vectors themselves, layer by layer: they are wide."""
    import pandas as pd

    frames: dict[str, list[pandas.DataFrame]] = {"mixing_ratio": [], "cancellation": [], "norm_balance": []}
    for layer in layers:
        try:
            found = read_layer(layer)
        except ValueError as error:  # what was found without vectors stays
            study.left_out |= dict.fromkeys(frames, f"{error}; or take fewer texts (detailed)")
            return
        weights = description.layers[layer].weights(None)
        norm = weights.norm_after_ff or weights.norm_before_ff
        frames["mixing_ratio"].append(mixing_ratio(found["atb"]))
        try:
            frames["norm_balance"].append(norm_balance(found))
            for order, scores in _list_orders(None if norm is None else norm.weight):
                frames["cancellation"].append(cancellation(found, order=order, scores=scores))
        except ValueError as error:  # a parallel block, or one without a residual connection
            study.left_out["cancellation"] = str(error)
    for name, of_layers in frames.items():
        if of_layers:
            study.frames[name] = pd.concat(of_layers, ignore_index=True)


def _list_orders(gain: Tensor | None) -> Iterator[tuple[str, Tensor | None]]:
    """Yields the orders in which dimensions are removed: those first that the network writes most to, those that the
    norm scales down most, and as many at random."""
    yield "ff", None
    if gain is not None:
        yield "gain", -gain.detach().abs().double().cpu()
    yield "random", None
