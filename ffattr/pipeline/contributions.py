"""`contributions`: which tokens made the model compute a number, signed, through all of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..results.contributions import Contributions
from ..results.keep import Keep
from ..selection import Indices
from .entrance import accept_containers, name_broken_weights
from .options import IG, Options, Progress, check_progress
from .toward.follow import Follower
from .toward.gather import Gathered
from .toward.question import Question

__all__ = ["contributions"]

_ENDED = object()


@accept_containers
@name_broken_weights
def contributions(
    model: nn.Module,
    inputs: Any,
    *,
    target: Any,
    position: Any = -1,
    prompt_length: int | None = None,
    tokenizer: Any = None,
    layers: Indices = None,
    flow: bool | Literal["heads"] = False,
    scope: str = "layer",
    ig: IG = "exact",
    baseline: str | Tensor = "zero",
    value_bias: str = "token",
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    check: bool = True,
    progress: Progress | None = None,
    keep: str | Keep = "dense",
) -> Contributions:
    """What each token gives to a number that the model computes: signed, through all layers, and it adds up.

    Every layer is frozen at the model's own forward pass (attention weights, statistics of norms, Integrated-Gradients
    slopes of activations), and so is the head behind the last one. The number is then affine in the tokens' vectors at
    every layer boundary; one pass back through the frozen layers gives what each of them brings. It costs what a
    forward pass costs, at any length.

    target: a token id; a string that is one token; ``"predicted"``, the model's first choice; ``"next"``, the token
        that follows in the input; a class or its label of a classifier; a pair of these for the difference of their
        logits; a tensor ``[d]`` or ``[K, d]`` of directions that read the last hidden states; or a list of any of
        them. Logits are explained, not probabilities.
    position: the token whose output is read, counted without padding, negative from each sequence's end; a range or a
        list of them; ``"cls"`` (the first), ``"mask"`` (the mask token), ``"mean"`` (of all, for directions);
        ``"generated"`` with ``prompt_length``: every token after the prompt, with ``target="next"``. Classifiers of
        whole sequences read where they do. With several positions, targets of one position stand side by side.
    layers: whose boundaries are kept, None for all; those below the first of them are not computed.
    flow: also what passes from token to token in every layer; ``"heads"``: by head.
    scope: how far through a layer flow is followed. A scope before the feed-forward block goes on past it along the
        residual connection; the block's own (``"atb_ff"``) goes through it alone; both add up to ``"layer"``.
    value_bias: whether flow leaves ``b_V`` with its token (``"token"``) or not (``"separate"``, by which flow into all
        tokens sums to the token's score). Scores do not depend on it but with ``baseline="bias"``.
    dtype: ``torch.float32`` or ``float64``; None: float64 for a float64 model, else float32.
    memory_budget: bytes for records of layers; the model runs as often as it takes to record them in parts.
    check: compare every layer's recomputed output with the model's; a difference raises `ArchitectureMismatch`.
    keep: what becomes of flow, as for `ffattr.attribute`: ``"dense"``, `ffattr.Dense`, `ffattr.TopK` (the largest by
        size), `ffattr.Pool` or `ffattr.Reduce`.
    The others are those of `ffattr.attribute`.

    Gradient times input of the frozen network; see the docs for its kin. Raises ValueError, TypeError, IndexError or an
    `FfattrError`: `UnsupportedModel` where the head is not known.

    >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), position="mean", tokenizer=tokenizer)
    >>> c
    Contributions(1 targets, 3 layers, 1 x 6 tokens)
    >>> bool(c.error.max() < 1e-9)
    True
    """
    options = Options(scope, layers, None, None, None, ig, baseline, value_bias, dtype, memory_budget=memory_budget)
    check_progress(progress)
    question = Question.from_arguments(model, inputs, tokenizer, options, target, position, prompt_length, flow, keep)
    request, count = question.request, question.count
    gathered: dict[str, Gathered] = {}
    policy = question.keep if flow else None
    if len(request.stacks) > 1 and policy is not None:
        policy.check_stacks()
    try:
        for stack in request.stacks:
            found = Gathered(stack, question.layers[stack.name], count, request.dtype, policy, flow == "heads")
            gathered[stack.name] = found
        follower = Follower(question, gathered, check)
        batches, done = request.batches(), 0
        for batch, of_batch in batches:
            steps = follower.follow(batch, of_batch)
            while _take_step(steps):
                done += 1
                if progress is not None:
                    progress(done, len(batches) * follower.layers)
        return _make_result(question, gathered, follower, tokenizer)
    except BaseException:  # an interrupt as well: no half a file stays
        for part in gathered.values():
            part.discard_files()
        raise


@torch.no_grad()
def _take_step(steps: Iterator[None]) -> bool:
    """Does the next step, if there is one left; the caller's own mode is back when ``progress`` is called."""
    return next(steps, _ENDED) is not _ENDED


def _make_result(
    question: Question, gathered: Mapping[str, Gathered], follower: Follower, tokenizer: Any
) -> Contributions:
    request = question.request
    arguments = {
        **request.describe_arguments(),
        "dtype": str(request.dtype).removeprefix("torch."),  # nothing here is a product in a narrower one
        "keep": str(question.keep),
        "check": str(follower.check),
    }
    targets, positions = _name_targets(question, follower, tokenizer)
    results: dict[str, Contributions] = {}
    for stack in request.stacks:
        part = gathered[stack.name]
        kept = part.finish()
        result = Contributions(
            value=part.value,
            scores=part.scores,
            bias=part.bias,
            error=part.error,
            targets=targets,
            positions=positions,
            tokens=stack.tokens,
            labels=stack.labels,
            mask=stack.mask,
            layers=question.layers[stack.name],
            scope=stack.scopes[0].name if question.flow else None,
            kept=kept.get("own"),
            cross_kept=kept.get("cross"),
            residual=part.residual,
            cross_scores=part.cross_scores,
            cross_tokens=stack.encoder_tokens,
            cross_mask=stack.encoder_mask,
            encoder=results.get("encoder"),
            arguments=arguments,
        )
        part.seal_file(*result.to_parts())
        results[stack.name] = result
    return results[request.stacks[-1].name]


def _name_targets(question: Question, follower: Follower, tokenizer: Any) -> tuple[list[list[str]], Tensor]:
    """Returns what the numbers are called, ``[K][B]``, and where each is read, ``[K, B]`` (-1: of the whole)."""
    mask = question.request.stacks[-1].mask
    names = [[""] * len(mask) for _ in range(question.count)]
    positions = torch.full((question.count, len(mask)), -1)
    labels = question.labels
    for row in range(len(mask)):
        columns = follower.columns[row]
        places = [] if question.positions == "mean" or follower.reads_whole else question.locate(row)
        for number in range(question.count):
            position, target = divmod(number, len(question.targets))
            asked = question.targets[target]
            name = asked.label
            if columns is not None and not (isinstance(asked.plus, int) and isinstance(asked.minus, int | None)):
                plus, minus = columns[number]
                parts = [_name_column(one, labels, tokenizer) for one in (plus, minus) if one is not None]
                name = " - ".join(parts)
            names[number][row] = name
            if places:
                positions[number, row] = places[position]
    return names, positions


def _name_column(column: int, labels: Mapping[int, str] | None, tokenizer: Any) -> str:
    if labels is not None:
        return labels.get(column, str(column))
    return str(tokenizer.decode([column])) if hasattr(tokenizer, "decode") else str(column)
