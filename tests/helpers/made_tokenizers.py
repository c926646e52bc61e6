"""Small tokenizers of known words and pieces, made without any file."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def make_tokenizer(**special: str) -> Any:
    """Returns one of whole words; ``special`` names its special tokens, as transformers does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_input_names=names, **special)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def fast(tokenizer: Tokenizer, special: bool = False) -> Any:
    """Wraps ``tokenizer`` for transformers; with ``special`` it puts [CLS] and [SEP] around a text."""
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", model_input_names=names
    )


def wordpiece() -> Any:
    """Returns one that cuts words into pieces, as BERT's does."""
    pieces = [*SPECIAL, "the", "cat", "##s", "play", "##ing", ".", "a"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return fast(tokenizer, special=True)
