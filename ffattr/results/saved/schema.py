"""What a file has to hold, in which shapes and dtypes: checked here alone, before anything is made of it.

Shapes: ``L`` layers, ``B`` sequences, ``N`` query tokens, ``T`` tokens, ``C`` columns of maps, ``K`` numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from ...errors import FileFormatError
from ..kept.policy import Kept
from ..scope_names import extra_axis

__all__ = ["check_attribution", "check_contributions", "check_flow", "check_maps", "read_texts"]

_LARGEST = 2**31  # that a number of a layer or a block may be
_KINDS = {
    "floats": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "integers": (torch.int64, torch.int32),
    "booleans": (torch.bool,),
}
Kind = Literal["floats", "integers", "booleans"]


def check_attribution(tensors: Mapping[str, Tensor], content: Any, name: str) -> None:
    """Checks all of an `ffattr.Attribution` but its maps, of the file ``name``.

    Raises `FileFormatError` that names what is missing or does not fit.
    """
    file = _File.from_parts(tensors, content, name)
    scopes = file.read_names("scopes")
    layers, (sequences, tokens) = len(file.read_numbers("layers")), file.read_sizes("mask")
    queries = len(file.read_numbers("queries", below=tokens))
    columns = tokens
    if "key_mask" in tensors:
        _, columns = file.read_sizes("key_mask", sequences)
    file.check_texts("tokens", sequences, tokens)
    file.check_texts("labels", sequences, tokens, optional=True)
    file.check_texts("key_tokens", sequences, columns, optional=True)
    file.check_description()
    file.check_tensor("error", [layers, sequences])
    if "groups" in tensors:
        file.check_tensor("groups", [sequences, tokens], "integers")
        file.check_range("groups", -1, columns)
    if "experts" in tensors or "shares" in tensors:
        shape = [layers, sequences, queries, file.find_tensor("experts").shape[-1:].numel()]
        file.check_tensor("experts", shape, "integers")
        file.check_tensor("shares", shape)
    for scope in scopes:
        file.check_tensor(f"bias.{scope}", [layers, sequences, queries])
        if f"sketch_error.{scope}" in tensors:
            file.check_tensor(f"sketch_error.{scope}", [layers, sequences])


def check_contributions(tensors: Mapping[str, Tensor], content: Any, name: str) -> None:
    """Checks all of `ffattr.Contributions` but their flow and those of an encoder, of the file ``name``.

    Raises `FileFormatError` that names what is missing or does not fit.
    """
    file = _File.from_parts(tensors, content, name)
    layers, (sequences, tokens) = len(file.read_numbers("layers")), file.read_sizes("mask")
    numbers = file.find("targets")
    count = len(numbers) if isinstance(numbers, list) else file.fail("'targets', expected a list for each number")
    file.check_texts("targets", count, sequences)
    file.check_texts("tokens", sequences, tokens)
    file.check_texts("labels", sequences, tokens, optional=True)
    for key, shape in {
        "value": [count, sequences],
        "scores": [count, layers + 1, sequences, tokens],
        "bias": [count, layers + 1, sequences],
        "error": [count, sequences],
    }.items():
        file.check_tensor(key, shape)
    file.check_tensor("positions", [count, sequences], "integers")
    file.check_range("positions", -1, tokens)
    if "residual" in tensors:
        file.check_tensor("residual", [count, layers, sequences, tokens])
    if "cross_scores" in tensors or "cross_mask" in tensors:
        _, others = file.read_sizes("cross_mask", sequences)
        file.check_tensor("cross_scores", [count, layers + 1, sequences, others])
        file.check_texts("cross_tokens", sequences, others, optional=True)
    if not isinstance(file.find("scope"), str | None):
        file.fail("'scope', expected the name of one or none")
    if content.get("cross_flow") is not None:
        file.find_tensor("cross_mask")
        file.check_block(content["cross_flow"])
    file.check_description()


def check_maps(kept: Kept, scopes: Collection[str], outer: list[int], inner: tuple[int, int], name: str) -> None:
    """Checks what is kept of maps ``[*outer, ..., *inner]``, of layers and sequences, queries and columns."""
    for scope in scopes:
        _check_kept(kept, scope, outer, inner, name, [5 if extra_axis(scope) else 4])


def check_flow(kept: Kept, scope: str, outer: list[int], inner: tuple[int, int], name: str) -> None:
    """Checks what is kept of flow, which may be told apart by head."""
    _check_kept(kept, scope, outer, inner, name, [4, 5])


def _check_kept(
    kept: Kept, scope: str, outer: list[int], inner: tuple[int, int], name: str, axes: Collection[int]
) -> None:
    for part in kept.list_sizes(scope, *inner):
        shape, ends = list(part.tensor.shape), len(part.inner)
        missing = 2 - ends  # of one axis, where there is no column
        if shape[:2] + shape[len(shape) - ends :] != outer + list(part.inner) or len(shape) + missing not in axes:
            raise FileFormatError(
                f"{name!r}: {part.what} {scope} has shape {shape}, expected {[*outer, *part.inner]} (layers, "
                "sequences, queries, tokens)"
            )
        kind: Kind = "floats" if part.below is None else "integers"
        _require_kind(part.tensor, kind, f"{name!r}: {part.what} {scope}")
        if part.below is not None:
            _require_range(part.tensor, -1, part.below, f"{name!r}: {part.what} {scope}")


def read_texts(value: list[list[str]]) -> list[list[str]]:
    """Returns texts that were checked; half a character becomes a question mark, which any file takes."""
    return [[text.encode("utf-8", "replace").decode() for text in row] for row in value]


@dataclass(frozen=True)
class _File:
    """A file that is being checked; whatever fails raises `FileFormatError`."""

    tensors: Mapping[str, Tensor]
    content: Mapping[str, Any]
    name: str

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], content: Any, name: str) -> _File:
        file = cls(tensors, content, name)
        if not isinstance(content, dict):
            file.fail(f"its description, expected an object and not {type(content).__name__}")
        return file

    def fail(self, what: str) -> NoReturn:
        raise FileFormatError(f"{self.name!r} says it is an ffattr file but lacks or garbles {what}")

    def find(self, key: str) -> Any:
        return self.content[key] if key in self.content else self.fail(repr(key))

    def find_tensor(self, key: str) -> Tensor:
        return self.tensors[key] if key in self.tensors else self.fail(repr(key))

    def read_names(self, key: str) -> list[str]:
        names = self.find(key)
        if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
            self.fail(f"{key!r}, expected a list of names")
        if len(set(names)) < len(names):
            self.fail(f"{key!r}: {names} has a name twice")
        return list(names)

    def read_numbers(self, key: str, below: int = _LARGEST) -> list[int]:
        numbers = self.find(key)
        if not isinstance(numbers, list) or not all(type(one) is int and 0 <= one < below for one in numbers):
            self.fail(f"{key!r}, expected a list of integers from 0 to {below - 1}")
        return list(numbers)

    def read_sizes(self, key: str, sequences: int | None = None) -> tuple[int, int]:
        """Returns how many sequences and tokens a mask is of."""
        mask = self.find_tensor(key)
        if mask.dim() != 2 or (sequences is not None and len(mask) != sequences):
            self.fail(f"{key!r} of shape {list(mask.shape)}, expected sequences and tokens")
        _require_kind(mask, "booleans", f"{self.name!r}: {key}")
        return mask.shape[0], mask.shape[1]

    def check_texts(self, key: str, rows: int, columns: int, optional: bool = False) -> None:
        """Checks ``rows`` lists of ``columns`` texts each; or none at all, where tokens have no texts."""
        texts = self.content.get(key) if optional else self.find(key)
        if (optional and texts is None) or texts == []:
            return
        if not isinstance(texts, list) or len(texts) != rows or not all(isinstance(row, list) for row in texts):
            self.fail(f"{key!r}, expected {rows} lists of texts")
        for row in texts:
            if len(row) != columns or not all(isinstance(text, str) for text in row):
                self.fail(f"{key!r}, expected {columns} texts in each list")

    def check_description(self) -> None:
        """Checks what describes how a result was made."""
        if not isinstance(self.content.get("plan"), str | None):
            self.fail("'plan', expected a text or none")
        arguments = self.find("arguments")
        if not isinstance(arguments, dict):
            self.fail("'arguments', expected an object")
        skipped = arguments.get("skipped", [])
        if not isinstance(skipped, list) or not all(map(_is_skipped, skipped)):
            self.fail("'skipped', expected a place, a type of error and a message for each input that was left out")
        self.check_block(self.content)

    def check_block(self, kept: Any) -> None:
        """Checks what is said of how maps or flow were kept: how many tokens a block of `ffattr.Pool` has."""
        block = kept.get("block") if isinstance(kept, dict) else self.fail(f"{kept!r}, expected an object")
        if block is not None and not (type(block) is int and 0 < block < _LARGEST):
            self.fail(f"'block': {block!r}, expected a number of tokens or none")

    def check_tensor(self, key: str, shape: list[int], kind: Kind = "floats") -> None:
        tensor = self.find_tensor(key)
        if list(tensor.shape) != shape:
            raise FileFormatError(f"{self.name!r}: {key} has shape {list(tensor.shape)}, expected {shape}")
        _require_kind(tensor, kind, f"{self.name!r}: {key}")

    def check_range(self, key: str, least: int, below: int) -> None:
        _require_range(self.find_tensor(key), least, below, f"{self.name!r}: {key}")


def _is_skipped(entry: Any) -> bool:
    """Tells whether an entry is one of `ffattr.selection.Skipped`."""
    return isinstance(entry, list) and [*map(type, entry)] == [int, str, str] and 0 <= entry[0] < _LARGEST


def _require_kind(tensor: Tensor, kind: Kind, what: str) -> None:
    if tensor.dtype not in _KINDS[kind]:
        raise FileFormatError(f"{what} is of {tensor.dtype}, expected {kind}")


def _require_range(tensor: Tensor, least: int, below: int, what: str) -> None:
    if tensor.numel() and not (least <= int(tensor.min()) and int(tensor.max()) < below):
        raise FileFormatError(
            f"{what} has numbers from {int(tensor.min())} to {int(tensor.max())}, expected {least} to {below - 1}"
        )
