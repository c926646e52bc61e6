"""`Contributions`: what each token gives, with its sign, to numbers that a model computes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import FileFormatError
from . import files
from .contents import describe_check
from .keep import restore_kept
from .kept.policy import Kept
from .saved.schema import check_contributions, check_flow, read_texts
from .signed.contents import FLOW as _FLOW
from .signed.contents import SignedContents, find_boundary, find_target, split_targets

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Contributions"]

_TENSORS = ("value", "scores", "bias", "error", "mask", "positions")
_OPTIONAL = ("residual", "cross_scores", "cross_mask")


@dataclass(eq=False)
class Contributions(SignedContents):
    """What each token gives to ``K`` numbers of ``B`` sequences, at every boundary of ``L`` layers; it adds up.

    ``value`` ``[K, B]`` are the model's own numbers, called ``targets`` ``[K][B]`` and read at ``positions`` ``[K, B]``
    of the padded input (-1: of the whole). ``scores`` ``[K, L + 1, B, T]`` is what each token's vector gives at the
    input of each of ``layers``, and last at the output of the last layer; ``bias`` ``[K, L + 1, B]`` what comes from no
    token: ``scores.sum(-1) + bias == value`` at every boundary. ``error`` ``[K, B]`` is the largest difference from it,
    relative to the value and what it is made of. Padding is zero. Pictures and tables call ``tokens`` by ``names``.

    ``flow`` ``[K, L, B, N, T]`` (by head ``[K, L, B, H, N, T]``) is what passes from token to token within a layer, at
    ``scope``, if it was asked for; ``residual`` ``[K, L, B, N]`` what tokens keep of themselves, which is part of the
    diagonal but of no head's.

    In a decoder with an encoder, ``cross_scores`` ``[K, L + 1, B, T']`` is what the encoder's states give through the
    cross-attention of the layers from a boundary on, which belongs to the sum; ``encoder`` follows all of it to the
    encoder's own layers and tokens: its ``value`` is what comes through the encoder.

    >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), tokenizer=tokenizer)
    >>> c.scores.shape  # targets, boundaries, sequences, tokens
    torch.Size([1, 4, 1, 6])
    >>> torch.allclose(c.scores.sum(-1) + c.bias, c.value[:, None])
    True
    """

    encoder: Contributions | None = None

    @property
    def flow(self) -> Tensor | None:
        """What passes from token to token, ``[K, L, B, N, T]`` or by head ``[K, L, B, H, N, T]``; None: not asked for.

        Raises ValueError where something else was kept of it, which ``kept`` has.
        """
        return None if self.kept is None else split_targets(self.kept, len(self.value))

    @property
    def cross_flow(self) -> Tensor | None:
        """What passes from an encoder's tokens to a decoder's, ``[K, L, B, N, T']``; None: there is none."""
        return None if self.cross_kept is None else split_targets(self.cross_kept, len(self.value))

    def __repr__(self) -> str:
        targets, sequences, tokens = len(self.value), len(self.mask), self.mask.shape[1]
        flow = "" if self.kept is None else f", flow at {self.scope}"
        rest = flow + describe_check(self.arguments)
        return f"Contributions({targets} targets, {len(self.layers)} layers, {sequences} x {tokens} tokens{rest})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a safetensors file that `ffattr.load` reads; whole or not at all.

        With keep=Reduce there is no flow to write, and the file is of the rest.

        >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), tokenizer=tokenizer)
        >>> c.save("contributions.safetensors")
        >>> torch.equal(ffattr.load("contributions.safetensors").scores, c.scores)
        True
        """
        files.write(path, *self.to_parts())

    def to_pandas(self) -> pandas.DataFrame:
        """Lists one row for each number, sequence, boundary and real token, and one for what comes from no token.

        Columns ``target``, its ``name``, ``read_at`` (the position that it is read at, -1: the whole), ``batch``,
        ``boundary`` from 0 and the ``layer`` whose input it is (missing at the last layer's output), ``position`` and
        ``token`` (-1 and ``"(bias)"``: none), ``score``. With an encoder also ``stack``: ``"decoder"``, ``"cross"``
        (what the encoder's states give through the layers from a boundary on) and ``"encoder"``.

        >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), tokenizer=tokenizer)
        >>> frame = c.to_pandas()
        >>> frame[frame.layer == 0].token.tolist()
        ['[CLS]', 'The', 'cat', 'sat', '.', '[SEP]', '(bias)']
        >>> bool(abs(frame[frame.boundary == 2].score.sum() - c.value[0, 0]) < 1e-6)
        True
        """
        from .signed import tables

        return tables.make_frame(self)

    def top(self, k: int = 10, layer: int | None = None) -> pandas.DataFrame:
        """Lists, for each number and sequence, the ``k`` tokens that give most, for it or against it.

        ``layer`` names the boundary: the input of that layer, -1 the output of the last one (None: the first that was
        kept). Columns ``target``, ``name``, ``batch``, ``rank`` from 1, ``position``, ``token`` and ``score``, with its
        sign; with an encoder also ``stack``, and tokens of both texts are ranked together.

        >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), tokenizer=tokenizer)
        >>> c.top(2)[["target", "batch", "rank"]].values.tolist()
        [[0, 0, 1], [0, 0, 2]]
        """
        from .signed import tables

        return tables.rank_tokens(self, k, find_boundary(self, layer))

    def to_words(self, *, words: Sequence[Sequence[int | None]] | None = None) -> Contributions:
        """Adds up the scores of the tokens of each word, and flow between them: both have signs, so this is exact.

        Words are read off the marks of tokens as `Attribution.to_words` does; for tokens without marks give ``words``,
        for every sequence a number for each token, None at special ones. ``positions`` become those of words. Flow that
        was not kept whole is left out.

        >>> c = ffattr.contributions(model, "Dogs barking.", target=torch.ones(40), tokenizer=tokenizer)
        >>> by_word = c.to_words()
        >>> by_word.tokens[0]
        ['[CLS]', 'Dogs', 'barking', '.', '[SEP]']
        >>> torch.allclose(by_word.scores[0, 0, 0, 1], c.scores[0, 0, 0, 1:3].sum())
        True
        """
        from .signed.words import merge_words

        encoder = None if self.encoder is None else self.encoder.to_words()
        return replace(self, **merge_words(self, words), encoder=encoder)

    def to_sentences(self) -> Contributions:
        """Adds up the scores of the tokens of each sentence, and flow between sentences, as `to_words` does for words.

        A sentence ends behind a full stop, question or exclamation mark, or at a line break; special tokens stay apart.
        For parts of another kind give `to_words` their numbers.

        >>> c = ffattr.contributions(model, "Dogs barking. The cat sat.", target=torch.ones(40), tokenizer=tokenizer)
        >>> c.to_sentences().tokens[0]
        ['[CLS]', 'Dogs barking.', 'The cat sat.', '[SEP]']
        """
        from .signed.words import merge_words

        encoder = None if self.encoder is None else self.encoder.to_sentences()
        return replace(self, **merge_words(self, None, sentences=True), encoder=encoder)

    def add_targets(self, targets: Sequence[int] | None = None, *, name: str | None = None) -> Contributions:
        """Adds up what is given to several of the numbers, None: to all: exact, since scores have signs.

        Of a generated answer, whose tokens are one number each, this says what the prompt gives to the whole. ``name``
        is what the sum is called (None: its parts, joined by " + "). ``positions`` are -1 where those of the parts
        differ. Raises IndexError or ValueError for numbers that do not exist or come twice.

        >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(2, 40), tokenizer=tokenizer)
        >>> torch.allclose(c.add_targets().scores[0], c.scores.sum(0))
        True
        """
        from .signed.targets import add_targets, check_numbers

        numbers = check_numbers(self, targets)
        encoder = None if self.encoder is None else self.encoder.add_targets(numbers, name=name)
        return replace(self, **add_targets(self, numbers, name), encoder=encoder)

    def plot(self, target: int = 0, batch: int = 0, *, layer: int | None = None, **options: Any) -> Figure:
        """Draws the text on colours of what its tokens give (blue for the number, orange against it), how that adds up
        with what comes from no token, and below what they give at the input of every layer.

        ``target`` and ``batch`` say which number; the text is coloured by the input of ``layer``, -1 the output of the
        last one (None: the first that was kept). With an encoder both texts are drawn. ``options`` go to
        `ffattr.plot.score_figure`.

        >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), tokenizer=tokenizer)
        >>> c.plot().axes[0].get_title(loc="left")
        'what speaks for “direction”, read at token 5'
        """
        from .signed import figures

        return figures.draw_scores(self, *find_target(self, target, batch), find_boundary(self, layer), options)

    def plot_flow(
        self,
        layer: int = -1,
        target: int = 0,
        batch: int = 0,
        *,
        head: int | None = None,
        cross: bool = False,
        **options: Any,
    ) -> Figure:
        """Draws what passes from token to token in one layer: blue for the number, orange against it.

        ``layer`` is the model's number of a layer, or negative: counted from the last one. Flow by head is added up
        unless ``head`` names one; ``cross`` draws that from an encoder's tokens. ``options`` go to
        `ffattr.plot.map_figure`. Raises ValueError where no flow was computed or kept.

        >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), tokenizer=tokenizer, flow=True)
        >>> [label.get_text() for label in c.plot_flow(1).axes[0].get_xticklabels()]
        ['[CLS]', 'The', 'cat', 'sat', '.', '[SEP]']
        """
        from .signed import figures

        return figures.draw_flow(self, layer, *find_target(self, target, batch), head, cross, options)

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None, limit: int = 15_000_000) -> None:
        """Writes a page to look around in: one HTML file that needs no network, whole or not at all.

        The text on colours of what its tokens give, how that adds up, a map of layers and tokens to click, and where
        flow was computed what passes from token to token in each layer. Numbers are kept as exactly as ``limit`` bytes
        allow, and the page says how exactly. Tokens are shown as text, whatever is in them.

        Raises ValueError where a page within ``limit`` cannot hold it, OSError where it cannot be written.

        >>> c = ffattr.contributions(model, "The cat sat.", target=torch.ones(40), tokenizer=tokenizer, flow=True)
        >>> c.to_html("contributions.html")
        """
        from .signed import pages

        files.write_text(path, pages.render_page(self, title, limit))

    def _repr_html_(self) -> str:
        from .signed import pages

        return pages.render_summary(self, repr(self))

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns all tensors by name, and what else there is as JSON takes it."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) is not None}
        described: dict[str, Any] = {
            "kind": "contributions",
            "targets": self.targets,
            "tokens": self.tokens,
            **({} if self.labels is None else {"labels": self.labels}),
            "cross_tokens": self.cross_tokens,
            "layers": self.layers,
            "scope": self.scope,
            "arguments": self.arguments,
            "flow": self.kept is not None and self.kept.can_save(_FLOW),
        }
        if self.kept is not None and self.kept.can_save(_FLOW):
            tensors |= self.kept.list_tensors([_FLOW])
            described |= self.kept.file_description()
        if self.cross_kept is not None and self.cross_kept.can_save(_FLOW):
            tensors |= {f"cross.{name}": one for name, one in self.cross_kept.list_tensors([_FLOW]).items()}
            described["cross_flow"] = self.cross_kept.file_description()
        if self.encoder is not None:
            of_encoder, described["encoder"] = self.encoder.to_parts()
            tensors |= {f"encoder.{name}": tensor for name, tensor in of_encoder.items()}
        return tensors, described

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], content: Any, name: str) -> Contributions:
        """Undoes `to_parts`; ``name`` is that of the file. Raises FileFormatError where they do not fit together."""
        check_contributions(tensors, content, name)
        encoder = None
        if content.get("encoder") is not None:
            prefix = "encoder."
            inner = {key.removeprefix(prefix): one for key, one in tensors.items() if key.startswith(prefix)}
            encoder = cls.from_parts(inner, content["encoder"], name)
        cross_texts = content.get("cross_tokens")
        numbers: dict[str, Any] = {key: tensors[key] for key in (*_TENSORS, *_OPTIONAL) if key in tensors}
        found = cls(
            **numbers,
            targets=read_texts(content["targets"]),
            tokens=read_texts(content["tokens"]),
            labels=None if content.get("labels") is None else read_texts(content["labels"]),
            cross_tokens=None if cross_texts is None else read_texts(cross_texts),
            layers=tuple(content["layers"]),
            scope=content["scope"],
            encoder=encoder,
            arguments=dict(content["arguments"]),
        )
        if content.get("flow"):
            found.kept = _restore_flow(tensors, content, found, found.mask, name)
        if content.get("cross_flow") is not None:
            of_cross = {key.removeprefix("cross."): t for key, t in tensors.items() if key.startswith("cross.")}
            assert found.cross_mask is not None
            found.cross_kept = _restore_flow(of_cross, content["cross_flow"], found, found.cross_mask, name)
        return found

    def select(self, target: int) -> Contributions:
        """One of the targets alone, with all of its sequences, without its flow."""
        from .signed.targets import select_target

        encoder = None if self.encoder is None else self.encoder.select(target)
        return replace(self, **select_target(self, target), encoder=encoder)


def _restore_flow(tensors: Mapping[str, Tensor], content: Any, found: Contributions, keys: Tensor, name: str) -> Kept:
    """Returns what was kept of flow from the tokens of ``keys`` ``[B, T]``. Raises FileFormatError."""
    try:
        kept = restore_kept([_FLOW], tensors, content)
    except KeyError as error:
        raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error
    outer = [len(found.targets) * len(found.layers), len(found.mask)]
    check_flow(kept, _FLOW, outer, (found.mask.shape[1], keys.shape[1]), name)
    return kept
