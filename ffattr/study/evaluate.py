"""How faithful scores of tokens are: what becomes of a model's probability when the tokens with the largest are gone.

Comprehensiveness and sufficiency are those of DeYoung et al. 2020 (ERASER, arXiv 1911.03429), the area over the
perturbation curve (AOPC) their mean over shares of tokens; scores of any method may be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..errors import names_missing_extra

if TYPE_CHECKING:
    import pandas

__all__ = ["Evaluation", "evaluate"]

Removal = Literal["mask", "delete"] | int
"""How a token is taken away: not attended to, cut out of the sequence, or replaced by the token of this id."""

_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # of ERASER


@dataclass(frozen=True)
class Evaluation:
    """``comprehensiveness`` ``[S, B]``: by how much the probability of the target falls when the share ``shares[s]`` of
    the tokens with the largest scores is taken away (more is better). ``sufficiency`` ``[S, B]``: by how much when
    these alone stay (less is better). ``probability`` ``[B]`` is that of the whole input; ``removed`` ``[S, B]`` says
    how many tokens a share was, at least one.

    >>> ids = tokenizer(["The cat sat on the mat."], return_tensors="pt")["input_ids"]
    >>> scores = ffattr.contributions(classifier, ids, target="predicted").scores[0, 0]
    >>> ffattr.evaluate(classifier, ids, scores, shares=(0.5,)).removed.tolist()  # of nine tokens
    [[5]]
    """

    comprehensiveness: Tensor
    sufficiency: Tensor
    probability: Tensor
    removed: Tensor
    shares: tuple[float, ...]

    @property
    def aopc(self) -> dict[str, float]:
        """The means over shares and sequences of both, and of the difference of the two, ``"total"``."""
        comprehensiveness, sufficiency = (float(x.mean()) for x in (self.comprehensiveness, self.sufficiency))
        return {
            "comprehensiveness": comprehensiveness,
            "sufficiency": sufficiency,
            "total": comprehensiveness - sufficiency,
        }

    @names_missing_extra
    def to_pandas(self) -> pandas.DataFrame:
        """Returns one row for each sequence and share.

        >>> ids = tokenizer(["The cat sat on the mat."], return_tensors="pt")["input_ids"]
        >>> scores = ffattr.contributions(classifier, ids, target="predicted").scores[0, 0]
        >>> list(ffattr.evaluate(classifier, ids, scores).to_pandas())[:3]
        ['batch', 'share', 'removed']
        """
        import pandas as pd

        rows = [
            (batch, share, int(self.removed[s, batch]), float(self.probability[batch]), *numbers)
            for s, share in enumerate(self.shares)
            for batch in range(len(self.probability))
            for numbers in [(float(self.comprehensiveness[s, batch]), float(self.sufficiency[s, batch]))]
        ]
        columns = ["batch", "share", "removed", "probability", "comprehensiveness", "sufficiency"]
        return pd.DataFrame(rows, columns=columns)


def evaluate(
    model: nn.Module,
    ids: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    scores: Tensor | Sequence[Tensor] | Sequence[Sequence[float]],
    *,
    target: int | Sequence[int] | Literal["predicted"] = "predicted",
    remove: Removal = "mask",
    shares: Sequence[float] = _SHARES,
    fixed: Tensor | Sequence[Sequence[bool]] | None = None,
) -> Evaluation:
    """Takes away the tokens with the largest ``scores`` and looks what becomes of the probability of ``target``.

    model: a language model, whose probability of the token after the last one is looked at, or a classifier of
        sequences; a transformers model in eval mode, which returns ``logits``.
    ids: token ids of each sequence, without padding.
    scores: as many numbers for each sequence; larger means: speaks more for the target. Of `ffattr.contributions`:
        ``c.scores[0, 0]``.
    target: the token or class, one for all or one for each sequence; ``"predicted"``: the model's first choice.
    remove: ``"mask"`` (nothing attends to it; the others keep their positions, unless the model counts them by its
        mask), ``"delete"`` (the sequence gets shorter), or the id of a token that takes its place.
    shares: of the tokens that may go; rounded up.
    fixed: tokens that always stay, for instance special ones. A language model's last token stays in any case.

    >>> ids = tokenizer(["The cat sat on the mat."], return_tensors="pt")["input_ids"]
    >>> c = ffattr.contributions(classifier, ids, target="predicted")
    >>> found = ffattr.evaluate(classifier, ids, c.scores[0, 0], remove="delete")
    >>> found.comprehensiveness.shape, sorted(found.aopc)
    (torch.Size([5, 1]), ['comprehensiveness', 'sufficiency', 'total'])

    Raises TypeError or ValueError for scores that do not fit the ids, sequences without a token that may go, and
    values that are none of the above.
    """
    rows = [torch.as_tensor(row).flatten() for row in ids]
    values = [torch.as_tensor(row).flatten().double() for row in scores]
    stays = (
        [torch.zeros(len(row), dtype=torch.bool) for row in rows]
        if fixed is None
        else [torch.as_tensor(row).flatten().bool() for row in fixed]
    )
    _check_arguments(rows, values, stays, remove, shares)
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call model.eval()")
    asked: list[int | None]
    if target == "predicted":
        asked = [None] * len(rows)
    else:
        asked = [target] * len(rows) if isinstance(target, int) else [int(one) for one in target]
        if len(asked) != len(rows):
            raise ValueError(f"target has {len(asked)} entries for {len(rows)} sequences")
    found = [
        _perturb_sequence(model, row, value, stay, one, remove, shares)
        for row, value, stay, one in zip(rows, values, stays, asked, strict=True)
    ]
    removed, probability, without, alone = (torch.stack(parts, -1) for parts in zip(*found, strict=True))
    return Evaluation(probability - without, probability - alone, probability, removed, tuple(shares))


def _check_arguments(
    rows: Sequence[Tensor], values: Sequence[Tensor], stays: Sequence[Tensor], remove: Removal, shares: Sequence[float]
) -> None:
    if not rows:
        raise ValueError("there are no sequences to evaluate")
    if not len(rows) == len(values) == len(stays):
        raise ValueError(f"there are {len(rows)} sequences, {len(values)} rows of scores and {len(stays)} of fixed")
    for number, (row, value, stay) in enumerate(zip(rows, values, stays, strict=True)):
        if row.is_floating_point() or not len(row) == len(value) == len(stay):
            raise ValueError(
                f"sequence {number} has {len(row)} ids of {row.dtype}, {len(value)} scores and {len(stay)} entries of "
                "fixed; expected as many of each, ids integers, without padding"
            )
        if not value.isfinite().all():
            raise ValueError(f"scores of sequence {number} have entries that are NaN or infinite")
    if isinstance(remove, bool) or not (isinstance(remove, int) or remove in ("mask", "delete")):
        raise ValueError(f"remove is {remove!r}, expected 'mask', 'delete' or the id of a token")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares are {tuple(shares)!r}, expected numbers above 0 and at most 1")


@torch.no_grad()
def _perturb_sequence(
    model: nn.Module,
    row: Tensor,
    scores: Tensor,
    stays: Tensor,
    target: int | None,
    remove: Removal,
    shares: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many tokens each share is ``[S]``, and the probabilities of one sequence: whole, without the tokens of each
    share, and of these alone, ``[S]`` each."""
    whole = _compute_probabilities(model, [row], [torch.ones_like(row, dtype=torch.bool)], remove)[0]
    logits_of_last = _reads_last(model)
    stays = stays.clone()
    stays[-1] |= logits_of_last
    free = (~stays).nonzero()[:, 0]
    if not len(free):
        raise ValueError("a sequence has no token that may be taken away")
    order = free[scores[free].argsort(descending=True, stable=True)]
    counts = [math.ceil(share * len(free)) for share in shares]
    kept = []
    for count in counts:
        without, alone = torch.ones_like(row, dtype=torch.bool), stays.clone()
        without[order[:count]] = False
        alone[order[:count]] = True
        kept += [without, alone]
    column = int(whole.argmax()) if target is None else target
    if not 0 <= column < len(whole):
        raise ValueError(f"target is {column}, but the model has {len(whole)} logits")
    found = _compute_probabilities(model, [row] * len(kept), kept, remove)[:, column].view(-1, 2)
    return torch.tensor(counts), whole[column], found[:, 0], found[:, 1]


def _compute_probabilities(model: nn.Module, rows: Sequence[Tensor], kept: Sequence[Tensor], remove: Removal) -> Tensor:
    """Probabilities ``[n, C]`` of sequences of which only the tokens ``kept`` are there, all in one run."""
    device = next(model.parameters()).device
    if remove == "delete":
        left = [row[there] for row, there in zip(rows, kept, strict=True)]
        longest = max(map(len, left))
        ids = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in left])
        mask = torch.stack([torch.arange(longest) < len(row) for row in left])
    else:
        ids, there = torch.stack(list(rows)), torch.stack(list(kept))
        mask = there if remove == "mask" else torch.ones_like(there)
        ids = ids if remove == "mask" else ids.masked_fill(~there, int(remove))
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
    if logits.dim() == 3:
        last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
        logits = logits[torch.arange(len(logits)), last.to(logits.device)]
    return logits.double().softmax(-1).cpu()


def _reads_last(model: nn.Module) -> bool:
    """Whether the probabilities are those of what comes after the last token."""
    return "Classification" not in type(model).__name__
