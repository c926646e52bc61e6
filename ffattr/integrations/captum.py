"""An attribution object as captum's own: `TokenContributions` stands where a pipeline takes one of ``captum.attr``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from captum.attr import Attribution
from torch import Tensor

from ..pipeline.contributions import contributions

__all__ = ["TokenContributions"]


class TokenContributions(Attribution):  # type: ignore[misc]  # captum is untyped here
    """What each token gives to a logit, ``[B, T]`` for token ids ``[B, T]``, by `ffattr.contributions`.

    ``model`` is the model itself, where captum's methods take any function: its layers are read. There is no baseline
    in the input, and one pass instead of many. ``options`` go to `ffattr.contributions` (``position``, ``baseline``,
    ``value_bias``, ...).

    >>> from ffattr.integrations.captum import TokenContributions
    >>> ids = torch.tensor([[2, 4, 5, 6, 3], [2, 10, 12, 3, 0]])  # the last one is padding
    >>> attributions = TokenContributions(classifier).attribute(ids, target=1, additional_forward_args=ids != 0)
    >>> attributions.shape, bool(attributions[1, 4] == 0)
    (torch.Size([2, 5]), True)
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model)
        self.options = options

    def attribute(
        self,
        inputs: Tensor,
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the scores ``[B, T]`` of the tokens, zero at padding, and with ``return_convergence_delta`` how far
        each sequence's scores are from their sum ``[B]``: scores + what comes from no token - the logit.

        inputs: ids ``[B, T]``, what the model's forward takes first; of an encoder-decoder, the encoder's.
        target: a class or token for all, one for each sequence (``[B]``), what else `ffattr.contributions` takes as
            one target, or None: the model's first choice.
        additional_forward_args: what forward takes behind the ids, in its order, as one value or a tuple (None for
            what it should not get), or by name. Give the attention mask wherever there is padding.

        Raises what `ffattr.contributions` raises.
        """
        rows, targets = None, "predicted" if target is None else target
        if isinstance(target, Tensor) and not target.is_floating_point() and target.numel() > 1:
            chosen, rows = target.flatten().unique(return_inverse=True)
            targets = chosen.tolist()
        elif isinstance(target, Tensor) and not target.is_floating_point():
            targets = int(target)
        found = contributions(
            self.forward_func, self._name_inputs(inputs, additional_forward_args), target=targets, **self.options
        )
        of_inputs = found if found.encoder is None else found.encoder
        scores = _pick(of_inputs.scores[:, 0], rows)
        if not return_convergence_delta:
            return scores
        total = found.scores[:, 0].sum(-1) + found.bias[:, 0] - found.value
        if found.cross_scores is not None:
            total = total + found.cross_scores[:, 0].sum(-1)
        return scores, _pick(total, rows)

    def has_convergence_delta(self) -> bool:
        return True

    def _name_inputs(self, inputs: Tensor, additional: Any) -> dict[str, Any]:
        """Returns what forward takes, by the names of its arguments."""
        names = list(inspect.signature(self.forward_func.forward).parameters)
        if isinstance(additional, Mapping):
            return {names[0]: inputs, **additional}
        values = additional if isinstance(additional, tuple) else (additional,)
        if len(values) >= len(names):
            raise ValueError(f"additional_forward_args has {len(values)} values, forward takes {len(names) - 1} more")
        return {names[0]: inputs} | {
            name: value for name, value in zip(names[1:], values, strict=False) if value is not None
        }


def _pick(values: Tensor, rows: Tensor | None) -> Tensor:
    """Returns, of ``values`` ``[K, B, ...]``, for each sequence those of its own target: ``[B, ...]``."""
    if rows is None:
        return values[0]
    return values[rows.to(values.device), range(values.shape[1])]
