"""What people hold a model in: a pipeline of transformers, a SentenceTransformer. Told by what they are, without
importing the packages that they come from."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedModel

__all__ = ["open_container"]


def open_container(held: Any, tokenizer: Any = None) -> tuple[Any, Any]:
    """Returns the model in a container and its tokenizer, if no other is given; anything else as it is.

    Raises `UnsupportedModel` for a container without a Transformer, and for a TransformerLens model, whose weights are
    rewritten.
    """
    package, kind = type(held).__module__.partition(".")[0], type(held).__name__
    pipeline = package == "transformers" and not isinstance(held, nn.Module) and hasattr(held, "tokenizer")
    if pipeline and isinstance(getattr(held, "model", None), nn.Module):
        return held.model, tokenizer or held.tokenizer
    if package == "sentence_transformers" and isinstance(held, nn.Module):
        for module in held.modules():
            if isinstance(getattr(module, "auto_model", None), nn.Module):
                return module.auto_model, tokenizer or held.tokenizer
        raise UnsupportedModel(f"there is no Transformer of transformers in this {kind}; pass the model itself")
    if package == "transformer_lens":
        raise UnsupportedModel(
            f"a {kind} of TransformerLens has weights that were rewritten (norms folded in, means taken out): maps of "
            "it are not those of the model that it was made of. Pass that model, as transformers loads it"
        )
    return held, tokenizer
