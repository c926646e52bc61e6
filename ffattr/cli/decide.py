"""The work of ``ffattr decide``: which words of a text speak for a number of a model, as coloured text, JSON and files.

``--json`` prints one object: ``model``, ``text``, ``target`` and ``contrast`` as asked, ``name`` of the number, the
``position`` of the word that it is read at (-1: of the whole), its ``value``, and what that is the sum of: ``words``, a
list of objects with ``word`` and ``score`` (with an encoder also ``stack``), and ``bias``. ``error`` is how far the sum
is from the value, relative. With ``--layers``, ``layers`` lists objects with ``layer`` (null at the output of the last
one), ``bias`` and ``scores``, one for each of ``words``. With ``--sentences`` words are sentences, everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from ..analysis.words import spell_tokens
from ..models import pretrained
from ..pipeline import contributions
from ..plot.style import SIGNED, format_signed, largest_but
from ..results.contributions import Contributions
from ..results.figures import save_figure
from ..results.signed.contents import Text, list_texts, name_boundaries
from .output import make_cell, print_json, print_line, show_controls
from .progress import show_progress

__all__ = ["Asked", "decide"]

_FEW = 24
"""Words that are all listed; of more only the strongest are."""
_STRONGEST = 12
_PAIRS = 10
_BAR = 24


@dataclass(frozen=True)
class Asked:
    """What is to be explained, as the options say, and what is to be shown and written of it."""

    target: str
    contrast: str | None
    position: int | str | None
    layers: bool
    sentences: bool
    flow: bool
    as_json: bool
    html: Path | None
    png: Path | None
    output: Path | None


def decide(name: str, text: str, asked: Asked) -> None:
    """Computes contributions, prints them by word and writes the files asked for.

    Raises OSError, ValueError or an `FfattrError`.
    """
    errors = Console(stderr=True)
    with errors.status("loading the model") if errors.is_terminal else nullcontext():
        model, tokenizer = pretrained.load_predictor(name)
    options = {
        "target": _choose_target(asked, model),
        "position": _choose_position(asked, model, tokenizer, text),
        "flow": asked.flow,
        "tokenizer": tokenizer,
    }
    inputs = _make_inputs(model, tokenizer, text)
    with show_progress(len(tokenizer(text)["input_ids"]), errors) as progress:
        found = contributions.contributions(model, inputs, progress=progress, **options)
    by_word = _merge_tokens(found, asked)
    if asked.as_json:
        print_json(_describe(name, text, asked, by_word))
    else:
        _print_words(by_word)
        if asked.layers:
            Console().print(_tabulate_layers(by_word))
        if asked.flow and not (asked.html or asked.png or asked.output):
            Console().print(_tabulate_flow(by_word))
    _write_files(found, asked, errors if asked.as_json else Console())


def _merge_tokens(found: Contributions, asked: Asked) -> Contributions:
    return found.to_sentences() if asked.sentences else found.to_words()


def _choose_target(asked: Asked, model: Any) -> Any:
    targets = [_read_target(one, model) for one in (asked.target, asked.contrast) if one is not None]
    return targets[0] if len(targets) == 1 else tuple(targets)


def _read_target(given: str, model: Any) -> str | int:
    """Returns a class by its number where a classifier has none of that label; anything else is text."""
    labels = model.config.id2label if "Classification" in type(model).__name__ else {}
    return int(given) if labels and given.isdecimal() and given not in labels.values() else given


def _choose_position(asked: Asked, model: Any, tokenizer: Any, text: str) -> int | str:
    """Returns where the number is read: the last token, or of a masked language model the mask."""
    if asked.position is not None:
        return asked.position
    mask = getattr(tokenizer, "mask_token", None)
    return "mask" if "MaskedLM" in type(model).__name__ and mask is not None and mask in text else -1


def _make_inputs(model: Any, tokenizer: Any, text: str) -> str | Mapping[str, Any]:
    """Returns the text, and for a decoder with an encoder what it begins to write with."""
    config = model.config
    if not config.is_encoder_decoder:
        return text
    names = ("decoder_start_token_id", "bos_token_id")
    start = next((one for name in names if (one := getattr(config, name, None)) is not None), 0)
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    return {"input_ids": ids, "decoder_input_ids": torch.tensor([[start]], device=model.device)}


def _list_scores(texts: list[Text]) -> list[tuple[str, str, float]]:
    """Lists stack, word and score of every word of all texts."""
    found = []
    for text in texts:
        scores = text.read_scores(0, 0).tolist()
        found += [(text.stack, word, score) for word, score in zip(text.label_tokens(0).labels, scores, strict=True)]
    return found


def _describe(name: str, text: str, asked: Asked, words: Contributions) -> dict[str, Any]:
    """Returns what ``--json`` prints."""
    texts = list_texts(words, 0)
    described: dict[str, Any] = {
        "model": name,
        "text": text,
        "target": asked.target,
        "contrast": asked.contrast,
        "name": words.targets[0][0],
        "position": int(words.positions[0, 0]),
        "value": float(words.value[0, 0]),
        "bias": sum(float(one.bias[0, 0]) for one in texts),
        "error": float(words.error[0, 0]),
        "words": [
            {"word": word, "score": score, **({"stack": stack} if stack else {})}
            for stack, word, score in _list_scores(texts)
        ],
    }
    if asked.layers:
        described["layers"] = []
        for place, layer in enumerate([*words.layers, None]):
            there = list_texts(words, place)
            bias = sum(float(one.bias[0, 0]) for one in there)
            scores = [score for _, _, score in _list_scores(there)]
            described["layers"].append({"layer": layer, "bias": bias, "scores": scores})
    return described


def _print_words(words: Contributions) -> None:
    """Prints the text in colours, the words with their scores, and how they add up."""
    console = Console(highlight=False)
    texts = list_texts(words, 0)
    listed = _list_scores(texts)
    name, at = words.targets[0][0], int(words.positions[0, 0])
    where = "" if at < 0 else f", read at {words.tokens[0][at]!r}"
    console.print(show_controls(f"what speaks for {name!r}{where}"), markup=False, style="bold")
    sizes = torch.tensor([score for *_, score in listed], dtype=torch.float64)
    most, others = largest_but(sizes, 0), largest_but(sizes, max(1, len(sizes) // 50))
    top = (most if most <= 4 * others or not others else 2 * others) or 1.0
    for text in texts:
        line = Line(f"{text.stack}: " if text.stack else "")
        pieces = spell_tokens(text.label_tokens(0).labels)
        for piece, score in zip(pieces, text.read_scores(0, 0).tolist(), strict=True):
            piece = show_controls(piece, keep="\n")
            bare = piece.lstrip(" ")
            line.append(" " * (len(piece) - len(bare)))
            line.append(bare, _choose_style(score / top))
        console.print(line)
    console.print(_tabulate_words(words, listed, texts))


def _choose_style(part: float) -> str:
    """Returns a style of rich for a score, as part of the largest: none near zero."""
    part = min(max(part, -1.0), 1.0)
    if abs(part) < 0.02:
        return ""
    at = (part + 1) / 2 * (len(SIGNED) - 1)
    left = min(int(at), len(SIGNED) - 2)
    red, green, blue = (
        round(int(SIGNED[left][n : n + 2], 16) * (1 - at + left) + int(SIGNED[left + 1][n : n + 2], 16) * (at - left))
        for n in (1, 3, 5)
    )
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    return f"{ink} on rgb({red},{green},{blue})"


def _tabulate_words(words: Contributions, listed: list[tuple[str, str, float]], texts: list[Text]) -> Table:
    order = list(range(len(listed)))
    if len(listed) > _FEW:
        order = sorted(order, key=lambda at: -abs(listed[at][2]))[:_STRONGEST]
    table = Table("", "word", "gives", "", box=None, pad_edge=False, show_header=False)
    most = max((abs(listed[at][2]) for at in order), default=0.0) or 1.0
    for at in order:
        stack, word, score = listed[at]
        bar = Line("█" * max(round(abs(score) / most * _BAR), score != 0), SIGNED[6] if score > 0 else SIGNED[2])
        table.add_row(f"{stack} {at}".strip(), make_cell(word), format_signed(score), bar)
    if len(order) < len(listed):
        rest = sum(score for *_, score in listed) - sum(listed[at][2] for at in order)
        table.add_row("", f"[dim]{len(listed) - len(order)} other words[/dim]", format_signed(rest), "")
    bias = sum(float(one.bias[0, 0]) for one in texts)
    total = sum(score for *_, score in listed) + bias
    table.add_row("", "[dim]bias, from no word[/dim]", format_signed(bias), "")
    table.add_row("", "[bold]sum[/bold]", f"[bold]{format_signed(total)}[/bold]", "")
    own = float(words.value[0, 0])
    table.add_row("", "the model's own number", format_signed(own), f"[dim]off by {float(words.error[0, 0]):.0e}[/dim]")
    return table


def _tabulate_layers(words: Contributions) -> Table:
    table = Table("layer", "words", "bias", "strongest at its input", title="layers", title_justify="left")
    for place, name in enumerate(name_boundaries(words)):
        texts = list_texts(words, place)
        listed = _list_scores(texts)
        strongest = sorted(listed, key=lambda one: -abs(one[2]))[:4]
        said = ", ".join(f"{make_cell(word)} {format_signed(score, 2)}" for _, word, score in strongest if score)
        total, bias = sum(score for *_, score in listed), sum(float(one.bias[0, 0]) for one in texts)
        table.add_row(name.removeprefix("layer "), format_signed(total), format_signed(bias), said)
    return table


def _tabulate_flow(words: Contributions) -> Table:
    """Lists the largest flows between different words of all layers."""
    table = Table("layer", "from", "to", "passes", title="what passes between words", title_justify="left")
    flow = words.flow
    assert flow is not None
    between = flow[0, :, 0].detach().cpu().double().clone()
    between.diagonal(dim1=-2, dim2=-1).zero_()
    for at in between.flatten().abs().topk(min(_PAIRS, between.numel())).indices.tolist():
        layer, to, of = (int(one) for one in torch.unravel_index(torch.tensor(at), between.shape))
        if between[layer, to, of]:
            names = [f"{place} {make_cell(words.tokens[0][place])}" for place in (of, to)]
            table.add_row(str(words.layers[layer]), *names, format_signed(float(between[layer, to, of])))
    return table


def _write_files(found: Contributions, asked: Asked, console: Console) -> None:
    if asked.output is not None:
        found.save(asked.output)
        print_line(f"contributions: {asked.output}", console)
    if asked.png is not None:
        save_figure(_merge_tokens(found, asked).plot(), asked.png)
        print_line(f"picture: {asked.png}", console)
    if asked.html is not None:
        found.to_html(asked.html)
        print_line(f"page: {asked.html}", console)
