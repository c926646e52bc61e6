"""What a user asks of `ffattr.contributions`, checked against the model before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModel
from ...models.inputs.prepare import Inputs
from ...models.registry import unwrap_model
from ...results.keep import Keep, parse_keep
from ...selection import indices
from ..options import Options
from ..request import Request
from .targets import Positions, Target, find_masks, parse_position, parse_targets

__all__ = ["Flow", "Question"]

Flow = bool | Literal["heads"]
"""Whether what passes from token to token is asked for, and whether by head."""


@dataclass(frozen=True)
class Question:
    """A request, and the numbers that are followed back: ``targets`` at ``positions``, position by position.

    ``model`` runs: the user's own where logits are explained, its base without a head for directions; ``head`` is the
    same without wrappers. ``layers`` of each stack are kept, and of their flow what ``keep`` says; ``whole``: the model
    reads its whole input, not a position.
    """

    request: Request
    model: nn.Module
    head: nn.Module
    targets: list[Target]
    labels: dict[int, str] | None
    positions: Positions
    is_default: bool
    layers: dict[str, tuple[int, ...]]
    flow: Flow
    keep: Keep

    @classmethod
    def from_arguments(
        cls,
        model: nn.Module,
        inputs: Any,
        tokenizer: Any,
        options: Options,
        target: Any,
        position: Any,
        prompt_length: int | None,
        flow: Flow,
        keep: str | Keep,
    ) -> Question:
        """Raises ValueError, TypeError, IndexError or an `FfattrError` that names the offending value."""
        if options.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype is {options.dtype}, expected torch.float32 or float64, or None")
        if not (isinstance(flow, bool) or flow == "heads"):
            raise ValueError(f"flow is {flow!r}, expected True, False or 'heads'")
        head = unwrap_model(model) if isinstance(model, nn.Module) else model
        labels = getattr(getattr(head, "config", None), "id2label", None)
        labels = labels if "Classification" in type(head).__name__ else None
        targets = parse_targets(target, tokenizer, labels)
        directed = [one.direction is not None for one in targets]
        if any(directed) != all(directed):
            raise ValueError("target mixes directions and logits; explain them in two calls")
        policy = parse_keep(keep)
        request = Request.from_options(model, inputs, tokenizer, replace(options, layers=None))
        for stack in request.stacks:
            points = {scope.point for scope in stack.scopes}
            if len(points) > 1 or any(scope.axis is not None for scope in stack.scopes):
                raise ValueError(f"scope={options.scopes!r}, expected one that is not by head or expert; see flow=")
        layers = {}
        for stack in request.stacks:
            layers[stack.name] = tuple(sorted(set(indices("layers", options.layers, len(stack.specs)))))
        last = request.stacks[-1]
        masks = find_masks(_find_ids(request), last.mask, tokenizer)
        positions = parse_position(position, prompt_length, last.mask.sum(1).tolist(), masks)
        if positions == "mean" and not directed[0]:
            raise ValueError("position='mean' is for directions; a model computes no logits of the mean of its tokens")
        base = request.description.base
        if not directed[0] and not _has_head(head, base):
            raise UnsupportedModel(
                f"{type(head).__name__} has no head: its output is hidden states. Load it with one "
                "(AutoModelForCausalLM, ...ForSequenceClassification), or pass a direction [d] as target."
            )
        return cls(
            request,
            base if directed[0] else model,
            head,
            targets,
            labels,
            positions,
            position == -1,
            layers,
            flow,
            policy,
        )

    @property
    def directed(self) -> bool:
        """Whether directions read the last hidden states, and not logits."""
        return self.targets[0].direction is not None

    @property
    def count(self) -> int:
        """How many numbers there are of each sequence, ``K``."""
        return len(self.targets) * (1 if self.positions == "mean" else len(self.positions[0]))

    def prepare_inputs(self, inputs: Inputs, batch: Sequence[int]) -> tuple[Inputs, dict[int, int] | None]:
        """Returns what the model runs on, and which of its logits are of which position (None: there are all)."""
        takes = inspect.signature(self.head.forward).parameters
        if self.directed or self.positions == "mean" or "logits_to_keep" not in takes:
            return inputs, None
        padded = sorted({place for row in batch for place in self.locate(row)})
        kept = torch.tensor(padded, device=inputs.mask.device)
        given = {**inputs.kwargs, "logits_to_keep": kept}
        return replace(inputs, kwargs=given), {place: number for number, place in enumerate(padded)}

    def find_following(self, row: int) -> list[int]:
        """Returns the ids of the tokens that follow those that are read of a sequence, -1: none does."""
        assert self.positions != "mean"
        ids, mask = _find_ids(self.request), self.request.stacks[-1].mask[row]
        real: list[int] = [] if ids is None else ids[row][mask].tolist()
        return [real[one + 1] if one + 1 < len(real) else -1 for one in self.positions[row]]

    def locate(self, row: int) -> list[int]:
        """Returns the places in the padded input of what is read of sequence ``row``."""
        assert self.positions != "mean"
        real = self.request.stacks[-1].mask[row].nonzero()[:, 0]
        found: list[int] = real[self.positions[row]].tolist()
        return found


def _find_ids(request: Request) -> Tensor | None:
    """Returns the token ids ``[B, T]`` of the last stack's own tokens, None: it reads something else."""
    name = "decoder_input_ids" if "encoder" in request.description.stacks else "input_ids"
    found = request.inputs.kwargs.get(name)
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None


def _has_head(head: nn.Module, base: nn.Module) -> bool:
    if head is not base:
        return True
    get: Any = getattr(head, "get_output_embeddings", None)
    return get is not None and get() is not None
