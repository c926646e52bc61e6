"""Models and what makes their inputs, from a folder, a GGUF file or by a name on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["load", "load_model", "load_predictor", "load_processor"]

_PROCESSORS = {
    "input_ids": ("AutoTokenizer", "tokenizer"),
    "pixel_values": ("AutoImageProcessor", "image processor"),
    "input_values": ("AutoFeatureExtractor", "feature extractor"),
    "input_features": ("AutoFeatureExtractor", "feature extractor"),
}

_ADAPTER = "adapter_config.json"
_TASKS = {  # of adapters, with the class of the model that each is for
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_HEADS = (  # an encoder-decoder is listed as a masked language model too
    ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
    ("AutoModelForMaskedLM", "MASKED_LM"),
    ("AutoModelForCausalLM", "CAUSAL_LM"),
)


def load(name: str) -> tuple[Any, Any]:
    """Loads the model (base model, without a head) and tokenizer of a folder, a GGUF file or a hub name.

    A folder may hold an adapter of PEFT alone: then it is on the model that it was made for.
    """
    if _is_adapter(name):
        return _load_adapted(name), load_processor(name, "input_ids")
    transformers, place, options = _find_source(name)
    with _explain_failure(name, "a model and tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        return _load_model(transformers, place, options), tokenizer


def load_model(name: str, dtype: torch.dtype | None = None) -> Any:
    """Loads the base model or, where a decoder has to be given something to read, the model that can write it."""
    if _is_adapter(name):
        return _load_adapted(name, dtype)
    transformers, place, options = _find_source(name)
    with _explain_failure(name, "a model"):
        return _load_model(transformers, place, options, dtype, head=True)


def load_predictor(name: str) -> tuple[Any, Any]:
    """Loads the model with the head that it was saved with, which makes logits, and its tokenizer.

    Raises ValueError for a model that was saved without one, OSError where it cannot be loaded.
    """
    if _is_adapter(name):
        return _load_adapted(name), load_processor(name, "input_ids")
    transformers, place, options = _find_source(name)
    with _explain_failure(name, "a model and tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        config = transformers.AutoConfig.from_pretrained(place, **options)
    saved = (config.architectures or ["nothing known"])[0]
    cls = transformers.AutoModelForCausalLM if "gguf_file" in options else _find_head(transformers, saved)
    if cls is None:
        raise ValueError(
            f"{name!r} was saved as {saved}, which has no head and so decides nothing: expected a language model "
            "(...ForCausalLM, ...ForMaskedLM) or a classifier (...ForSequenceClassification). To explain a direction "
            "of its hidden states call ffattr.contributions(target=direction)"
        )
    with _explain_failure(name, "a model"):
        return _read_weights(cls, place, options, None), tokenizer


def _find_head(transformers: Any, saved: str) -> Any:
    """Returns the class that loads a model saved as ``saved``, None: it has no head that makes logits."""
    from transformers.models.auto import modeling_auto

    for auto, kind in _HEADS:
        names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values()
        if any(saved == name or (isinstance(name, tuple | list) and saved in name) for name in names):
            return getattr(transformers, auto)
    return None


def load_processor(name: str, takes: str) -> Any:
    """Loads what makes the inputs called ``takes``: a tokenizer, an image processor or a feature extractor.

    Raises OSError where the model comes without, ValueError where no such inputs are known.
    """
    if takes not in _PROCESSORS:
        raise ValueError(f"{name!r} takes {takes}, expected a model of {', '.join(_PROCESSORS)}")
    cls, what = _PROCESSORS[takes]
    if _is_adapter(name) and not any(Path(name).glob("*token*")) and not any(Path(name).glob("*processor*")):
        name = str(_read_adapter(name)["base_model_name_or_path"])  # an adapter is mostly saved without one
    transformers, place, options = _find_source(name)
    with _explain_failure(name, f"the {what}"):
        return getattr(transformers, cls).from_pretrained(place, **options)


def _is_adapter(name: str) -> bool:
    """Tells a folder in which PEFT has saved an adapter, and no model."""
    return (Path(name) / _ADAPTER).is_file()


def _read_adapter(name: str) -> dict[str, Any]:
    """Reads the settings of an adapter. Raises ValueError where they do not say what model it is for."""
    found: dict[str, Any] = json.loads((Path(name) / _ADAPTER).read_text(encoding="utf-8"))
    if not found.get("base_model_name_or_path"):
        raise ValueError(f"{name!r} is an adapter whose {_ADAPTER} names no base_model_name_or_path: write it there")
    return found


def _load_adapted(name: str, dtype: torch.dtype | None = None) -> Any:
    """Loads a model with an adapter of PEFT on it, of the class that the adapter was made for.

    Raises ValueError without PEFT, OSError where either cannot be loaded.
    """
    try:
        import peft
    except ImportError:
        raise ValueError(f"{name!r} is an adapter of PEFT: pip install peft") from None
    settings = _read_adapter(name)
    transformers, place, options = _find_source(str(settings["base_model_name_or_path"]))
    made_for = (settings.get("auto_mapping") or {}).get("base_model_class")
    cls = getattr(transformers, made_for or _TASKS.get(str(settings.get("task_type")), "AutoModel"))
    with _explain_failure(place, f"the model of the adapter {name!r}"):
        model = _read_weights(cls, place, options, dtype)
    with _explain_failure(name, "an adapter"):
        return peft.PeftModel.from_pretrained(model, name).eval()


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


def _read_weights(cls: Any, place: str, options: dict[str, Any], dtype: torch.dtype | None) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On the CPU, half precision is both slower and less exact than what the decomposition computes in.
    chosen = dtype or (torch.float32 if device == "cpu" else "auto")
    return cls.from_pretrained(place, dtype=chosen, **options).eval().to(device)
