"""Models and what makes their inputs, from a folder, a GGUF file or by a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["load", "load_model", "load_processor", "load_with_head"]

_PROCESSORS = {
    "input_ids": ("AutoTokenizer", "tokenizer"),
    "pixel_values": ("AutoImageProcessor", "image processor"),
    "input_values": ("AutoFeatureExtractor", "feature extractor"),
    "input_features": ("AutoFeatureExtractor", "feature extractor"),
}


def load(name: str) -> tuple[Any, Any]:
    """Loads the model (base model, without a head) and tokenizer of a folder, a GGUF file or a hub name."""
    transformers, place, options = _find_source(name)
    with _explain_failure(name, "a model and tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        return _load_model(transformers, place, options), tokenizer


def load_model(name: str, dtype: torch.dtype | None = None) -> Any:
    """Loads the base model or, where a decoder has to be given something to read, the model that can write it."""
    transformers, place, options = _find_source(name)
    with _explain_failure(name, "a model"):
        return _load_model(transformers, place, options, dtype, head=True)


def load_with_head(name: str) -> tuple[Any, Any]:
    """Loads the model with the head that its configuration names, and its tokenizer: what makes logits or classes.

    Raises OSError where the configuration names none that transformers has.
    """
    transformers, place, options = _find_source(name)
    with _explain_failure(name, "a model with its head and tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        named = transformers.AutoConfig.from_pretrained(place, **options).architectures or ("none",)
        cls = getattr(transformers, named[0], None)
        if cls is None:
            raise ValueError(f"its configuration names the architecture {named[0]}, which transformers does not have")
        return _read_weights(cls, place, options), tokenizer


def load_processor(name: str, takes: str) -> Any:
    """Loads what makes the inputs called ``takes``: a tokenizer, an image processor or a feature extractor.

    Raises OSError where the model comes without, ValueError where no such inputs are known.
    """
    if takes not in _PROCESSORS:
        raise ValueError(f"{name!r} takes {takes}, expected a model of {', '.join(_PROCESSORS)}")
    transformers, place, options = _find_source(name)
    cls, what = _PROCESSORS[takes]
    with _explain_failure(name, f"the {what}"):
        return getattr(transformers, cls).from_pretrained(place, **options)


def _find_source(name: str) -> tuple[Any, str, dict[str, Any]]:
    """Returns transformers, and what its ``from_pretrained`` takes for ``name``. Raises OSError or ValueError."""
    path = Path(name)
    local = path.exists()
    if not local and (path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf"):
        raise FileNotFoundError(f"no model at {name!r}: there is no such file or folder")
    try:
        import transformers
    except ImportError:
        raise ValueError("loading a model needs transformers: pip install 'ffattr[models]'") from None
    import huggingface_hub

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # retries; what went wrong is said once, below
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    if path.is_file():
        return transformers, str(path.parent), options | {"gguf_file": path.name}
    return transformers, name, options


@contextmanager
def _explain_failure(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"could not load {what} from {name!r}: {first[0]}") from error


def _load_model(
    transformers: Any, place: str, options: dict[str, Any], dtype: torch.dtype | None = None, head: bool = False
) -> Any:
    """Loads a model; ``head``: with a language head where there are an encoder and a decoder."""
    from transformers.models.auto import modeling_auto

    config = transformers.AutoConfig.from_pretrained(place, **options)
    kind, cls = config.model_type, transformers.AutoModel
    if modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(kind) in (config.architectures or ()):
        cls = transformers.AutoModelForTextEncoding  # T5's encoder alone, where the other makes up a decoder
    elif head and config.is_encoder_decoder and kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        cls = transformers.AutoModelForSeq2SeqLM
    elif head and config.is_encoder_decoder and kind in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        cls = transformers.AutoModelForSpeechSeq2Seq
    return _read_weights(cls, place, options, dtype)


def _read_weights(cls: Any, place: str, options: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On the CPU, half precision is both slower and less exact than what the decomposition computes in.
    chosen = dtype or (torch.float32 if device == "cpu" else "auto")
    return cls.from_pretrained(place, dtype=chosen, **options).eval().to(device)
