"""What the examples in docstrings start from: a tiny random BERT, its tokenizer, and maps of two sentences."""

from __future__ import annotations

import functools
from typing import Any

import tiny_models
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import ffattr

_TEXT = "[PAD] [UNK] [CLS] [SEP] the cat sat on mat dog ##s bark ##ing bird saw two a and of it , . !"
PIECES = _TEXT.split()


def tokenizer() -> Any:
    """WordPiece, without case."""
    fast = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", PIECES.index("[CLS]")), ("[SEP]", PIECES.index("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@functools.cache
def namespace() -> dict[str, Any]:
    """The names that examples may use; ``attr`` is of ``model`` and all scopes, ``classifier`` one of sentences."""
    model, words = tiny_models.build("bert", num_hidden_layers=3, num_attention_heads=2), tokenizer()
    attr = ffattr.attribute(model, ["The cat sat on the mat.", "Dogs barking."], tokenizer=words, scopes="all")
    classifier = tiny_models.build("bert", head="ForSequenceClassification")
    given = {"model": model, "classifier": classifier, "tokenizer": words, "attr": attr}
    return {"torch": torch, "ffattr": ffattr, **given}
