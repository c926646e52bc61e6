"""The analyses of `ffattr.analysis` together, of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..analysis import (
    Alignment,
    AmplifiedPairs,
    Categories,
    ChangeSample,
    Several,
    TokenSummary,
    alignment,
    amplified_pairs,
    cancellation,
    category_rates,
    contextualization_change,
    gain_balance,
    mixing_ratio,
    norm_balance,
    rollout,
    token_summary,
)
from ..decomposition.scopes import Scope
from ..models.registry import ModelDescription, resolve
from ..pipeline.attribute import attribute
from ..pipeline.vectors import Vectors, vectors
from ..results import Attribution, StackedAttribution
from ..results.keep import Reduce
from ..results.pages import join_tokens
from .origins import OnError, Origin, Refused, pick_texts, shorten_text, tell_origins

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

    def add(
        self, name: str, analysis: Callable[[], pandas.DataFrame], origins: Sequence[Origin] = (), first: int = 0
    ) -> None:
        """Adds the frame of an analysis, or why there is none; ``origins`` are those of its sequences from ``first``
        on."""
        try:
            found = analysis()
        except ValueError as error:
            self.left_out[name] = str(error)
            return
        if len(found):
            self.frames[name] = tell_origins(found, origins, first=first) if origins else found
        else:  # no two tokens in any text, or a parallel block, which brings nothing to other tokens
            self.left_out[name] = "there is no pair of different tokens that it could be of"


def of_maps(
    name: str,
    attribution: Attribution,
    *,
    k: int = 50,
    categories: Categories | None = None,
    rolled: bool = False,
) -> Study:
    """Makes every analysis that maps which were kept allow.

    k: how many pairs of each layer are the most amplified ones. categories: of pairs; None: those read off tokens.
    rolled: adds `rollout`, which has a row for each pair of tokens. Rows say what their text is. Raises ValueError
    where the maps allow none.

    >>> study = ffattr.study.of_maps("tiny", attr, k=5)
    >>> list(study.frames)
    ['contextualization_change', 'amplified_pairs', 'amplified_categories', 'token_summary', 'alignment']
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
    origins = [Origin(text) for text in _read_texts(attribution)]
    study.add("contextualization_change", lambda: contextualization_change(attribution))
    study.add("amplified_pairs", lambda: amplified_pairs(attribution, k, categories=categories), origins)
    _add_categories(study, attribution, categories)
    study.add("token_summary", lambda: token_summary(attribution), origins)
    study.add("alignment", lambda: alignment(attribution))
    if rolled:
        _add_rollout(study, attribution, origins)
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
    rolled: bool = False,
    on_error: OnError = "raise",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Study:
    """Analyses a model on a corpus in one pass that keeps no maps; then, on the first ``detailed`` texts, adds what
    takes vectors (mixing ratio, cancellation, balance of norms).

    Maps to draw, and with ``rolled`` the rollout, are of one of the first texts, of about 100 characters. Rows say
    which text they are of, by its number from 1, ``line``, and itself. ``on_error="skip"`` leaves out empty texts and
    those longer than the model's positions; the frame ``errors`` has them. ``options`` are arguments of
    `ffattr.attribute`. Raises ValueError for a model with an encoder and a decoder, for such texts unless they are
    skipped, and what `ffattr.attribute` raises.

    >>> study = ffattr.study.of_model("tiny", model, ["The cat sat.", "Dogs barking."], tokenizer, k=5, detailed=1)
    >>> study.frames["cancellation"]["order"].unique().tolist()
    ['ff', 'gain', 'random']
    """
    description = resolve(model)
    if description.stacks:
        raise ValueError(
            f"{name} has an encoder and a decoder: map them with `attribute`, and analyse each of its stacks"
        )
    origins, refused = pick_texts(name, texts, tokenizer, description.max_positions, on_error)
    texts = [origin.text for origin in origins]
    categories = Categories() if categories is None else categories
    scopes = [scope for scope in description.layers[0].own_scopes if scope.axis is None]
    changes, pairs, tokens, angles = ChangeSample(), AmplifiedPairs(k), TokenSummary(), Alignment()
    collected = Reduce(Several(changes, pairs, tokens, *([angles] if _can_align(scopes) else [])))
    options = {"tokenizer": tokenizer, "scopes": [scope.name for scope in scopes], **options}
    attribution = attribute(model, list(texts), keep=collected, progress=progress, **options)
    study = Study(name)
    study.add("contextualization_change", changes.contextualization_change)
    study.add("amplified_pairs", lambda: pairs.frame(attribution, categories), origins)
    _add_categories(study, attribution, categories)
    study.add("token_summary", lambda: tokens.frame(attribution), origins)
    study.add("alignment", angles.frame)
    if refused:
        study.frames["errors"] = _list_refused(refused)
    add_examples(study, model, texts, detailed=detailed, rolled=rolled, origins=origins, **options)
    return study


def add_examples(
    study: Study,
    model: nn.Module,
    texts: Sequence[str],
    *,
    detailed: int = 8,
    rolled: bool = False,
    origins: Sequence[Origin] | None = None,
    **options: Any,
) -> None:
    """Adds to what was found of a corpus, whose first texts these are, what it takes whole maps or vectors to see.

    Maps to draw, and the rollout if ``rolled``, are of one of the first 20, of about 100 characters; mixing ratio,
    cancellation, balances of norms and gains of the first ``detailed``, and the angles of the network if there are none
    yet. ``origins`` say where texts come from (None: they are the lines of a file). ``options`` are arguments of
    `ffattr.attribute`, the tokenizer among them. Raises what `ffattr.attribute` raises.

    >>> study = ffattr.study.Study("tiny")
    >>> ffattr.study.add_examples(study, model, ["The cat sat."], tokenizer=tokenizer, detailed=1)
    >>> list(study.frames)
    ['alignment', 'mixing_ratio', 'cancellation', 'norm_balance', 'gain_balance']
    """
    description = resolve(model)
    scopes = [scope for scope in description.layers[0].own_scopes if scope.axis is None]
    options = {"scopes": [scope.name for scope in scopes], **options}
    shown = min(range(min(len(texts), 20)), key=lambda number: abs(len(texts[number]) - 100))
    study.example = attribute(model, [texts[shown]], **options)
    origins = [Origin(text, line + 1) for line, text in enumerate(texts)] if origins is None else origins
    if rolled:
        _add_rollout(study, study.example, origins, shown)
    if detailed and "alignment" not in study.frames and _can_align(scopes):
        angles = Alignment()
        attribute(model, list(texts[:detailed]), keep=Reduce(angles), **options)
        study.add("alignment", angles.frame)
    if detailed:
        behind_attention = [scope.name for scope in scopes if scope.point not in ("attn", "attn_res")]
        given = {option: options[option] for option in ("tokenizer", *_OF_VECTORS) if option in options}

        def read_layer(layer: int) -> dict[str, Vectors]:
            return vectors(model, list(texts[:detailed]), scope=behind_attention, layers=layer, **given)

        _add_detailed(study, description, study.example.layers, read_layer, origins)


def _can_align(scopes: Sequence[Scope]) -> bool:
    """Tells whether the network's own vectors and what bypasses it are among the scopes."""
    return {"atb", "ff", "ff_res"} <= {scope.point for scope in scopes}


def _read_texts(attribution: Attribution) -> list[str]:
    """Returns the text of each sequence, as far as its tokens tell."""
    texts = []
    for real, tokens in zip(attribution.mask.cpu().tolist(), attribution.names, strict=False):
        texts.append(join_tokens([token for token, there in zip(tokens, real, strict=True) if there]))
    return texts


def _list_refused(refused: Sequence[Refused]) -> pandas.DataFrame:
    import pandas as pd

    rows = [(one.origin.line, one.kind, one.message, shorten_text(one.origin.text)) for one in refused]
    return pd.DataFrame(rows, columns=["line", "error_type", "error", "text"])


def _add_categories(study: Study, attribution: Attribution, categories: Categories) -> None:
    if "amplified_pairs" in study.frames:
        pairs = study.frames["amplified_pairs"]
        study.add("amplified_categories", lambda: category_rates(pairs, attribution, categories))


def _add_rollout(study: Study, attribution: Attribution, origins: Sequence[Origin], first: int = 0) -> None:
    """Adds rollout up to the last layer, without and with feed-forward blocks. ``first`` numbers the first sequence."""
    if attribution.mask.shape[1] > _MOST_ROLLED:
        study.left_out["rollout"] = f"{attribution.mask.shape[1]} tokens are too many for a table of pairs"
        return

    def roll_to_last() -> pandas.DataFrame:
        scopes = dict.fromkeys(scope for scope in ("atb", attribution.scopes[-1]) if scope in attribution.scopes)
        found = rollout(attribution, list(scopes))
        return found[found["layer"] == attribution.layers[-1]].assign(batch=lambda rows: rows["batch"] + first)

    study.add("rollout", roll_to_last, origins)


def _add_detailed(
    study: Study,
    description: ModelDescription,
    layers: Sequence[int],
    read_layer: Callable[[int], dict[str, Vectors]],
    origins: Sequence[Origin],
) -> None:
    """Adds what takes the vectors themselves, layer by layer: they are wide."""
    import pandas as pd

    names = ("mixing_ratio", "cancellation", "norm_balance", "gain_balance")
    frames: dict[str, list[pandas.DataFrame]] = {name: [] for name in names}
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
            if norm is not None and norm.weight is not None:
                frames["gain_balance"].append(gain_balance(found, norm.weight))
        except ValueError as error:  # a parallel block, or one without a residual connection
            study.left_out["cancellation"] = str(error)
    for name, of_layers in frames.items():
        if of_layers:
            study.frames[name] = tell_origins(pd.concat(of_layers, ignore_index=True), origins)


def _list_orders(gain: Tensor | None) -> Iterator[tuple[str, Tensor | None]]:
    """Yields the orders in which dimensions are removed: those first that the network writes most to, those that the
    norm scales down most, and as many at random."""
    yield "ff", None
    if gain is not None:
        yield "gain", -gain.detach().abs().double().cpu()
    yield "random", None
