"""Small random models of every supported family, for tests.

All parameters are random, gains and biases too, so that nothing hides behind ones and zeros. In float64 the RMSNorm
modules of transformers, which compute in float32 whatever their input, are replaced by ``nn.RMSNorm``.
"""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61
POSITIONS = 32
LAYERS = 2

_BERT = {
    "hidden_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "intermediate_size": 52,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
_ROBERTA = {**_BERT, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1}
_OPT = {
    "hidden_size": 40,
    "word_embed_proj_dim": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "ffn_dim": 52,
    "max_position_embeddings": POSITIONS,
}
_LLAMA = {
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 76,
    "max_position_embeddings": POSITIONS,
}
_DECODER = {**_LLAMA, "pad_token_id": 0}
_WINDOWS = {**_DECODER, "head_dim": 10, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
_NEOX = {
    "hidden_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "intermediate_size": 52,
    "max_position_embeddings": POSITIONS,
}
_IMAGE = {
    "hidden_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "intermediate_size": 52,
    "image_size": 12,
    "patch_size": 4,
}
_DINOV2 = {**{name: value for name, value in _IMAGE.items() if name != "intermediate_size"}, "mlp_ratio": 2}
_SOUND = {
    "hidden_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 5,
    "intermediate_size": 52,
    "conv_dim": [12, 10],
    "conv_kernel": [4, 3],
    "conv_stride": [3, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.9,
}
_GPT = {
    "n_embd": 40,
    "n_layer": LAYERS,
    "n_head": 5,
    "n_positions": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_FALCON = {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_hidden_size": 52}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
_TORCH: dict[str, Any] = {"d_model": 40, "nhead": 5, "dim_feedforward": 52, "activation": "gelu", "batch_first": True}

# name: (class prefix, configuration); a torch model has the class name TransformerEncoder or TransformerEncoderLayer
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT),
    "bert-decoder": ("Bert", {**_BERT, "is_decoder": True, "hidden_act": "gelu_new", "chunk_size_feed_forward": 1}),
    "roberta": ("Roberta", _ROBERTA),
    "xlm-roberta": ("XLMRoberta", _ROBERTA),
    "camembert": ("Camembert", _ROBERTA),
    "distilbert": (
        "DistilBert",
        {
            "dim": 40,
            "n_layers": LAYERS,
            "n_heads": 5,
            "hidden_dim": 52,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 0,
        },
    ),
    "electra": ("Electra", {**_BERT, "embedding_size": 24}),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 40,
            "n_layer": LAYERS,
            "n_head": 5,
            "n_inner": 52,
            "n_positions": POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "opt": ("OPT", {**_OPT, "do_layer_norm_before": True}),
    "opt-350m": ("OPT", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-no-affine": (
        "OPT",
        {**_OPT, "do_layer_norm_before": True, "layer_norm_elementwise_affine": False, "enable_bias": False},
    ),
    "llama": ("Llama", _LLAMA),
    "llama-bias": ("Llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 3}),
    "qwen2": ("Qwen2", _LLAMA),
    "torch-post": ("TransformerEncoder", _TORCH),
    "torch-pre": ("TransformerEncoder", {**_TORCH, "norm_first": True}),
    "torch-seq-first": ("TransformerEncoder", {**_TORCH, "batch_first": False, "activation": "relu"}),
    "torch-even-heads": ("TransformerEncoder", {**_TORCH, "nhead": 4}),  # takes the fused fast path
    "torch-no-bias": ("TransformerEncoder", {**_TORCH, "norm_first": True, "bias": False}),
    "torch-layer": ("TransformerEncoderLayer", {**_TORCH, "nhead": 4}),
}

FAMILIES = tuple(_MODELS)
"""That most tests try."""
TORCH_FAMILIES = tuple(name for name in FAMILIES if name.startswith("torch-"))
HF_FAMILIES = tuple(name for name in FAMILIES if name not in TORCH_FAMILIES)

_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 10}),
    "smollm3": ("SmolLM3", _DECODER),
    "ernie4_5": ("Ernie4_5", _DECODER),
    "gemma": ("Gemma", {**_DECODER, "head_dim": 10}),
    # Caps attention logits, which transformers does in its eager function alone.
    "gemma2": ("Gemma2", {**_WINDOWS, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3Text", _WINDOWS),
    "olmo2": ("Olmo2", _DECODER),
    "olmo3": ("Olmo3", {**_WINDOWS, "head_dim": 8}),
    "phi3": ("Phi3", _DECODER),
    "glm": ("Glm", {**_DECODER, "head_dim": 8}),
    "glm4": ("Glm4", {**_DECODER, "head_dim": 8}),
    "starcoder2": ("Starcoder2", _DECODER),
    "arcee": ("Arcee", _DECODER),
    "stablelm": ("StableLm", _DECODER),
    "stablelm-parallel": ("StableLm", {**_DECODER, "use_parallel_residual": True, "qk_layernorm": True}),
    "phi": ("Phi", _DECODER),
    "gpt-neox": ("GPTNeoX", _NEOX),
    "gpt-neox-sequential": ("GPTNeoX", {**_NEOX, "use_parallel_residual": False}),
    "ernie": ("Ernie", _BERT),
    "data2vec-text": ("Data2VecText", _ROBERTA),
    "granite": ("Granite", {**_DECODER, "residual_multiplier": 0.7, "attention_multiplier": 0.3}),
    "gpt-bigcode": ("GPTBigCode", {**_GPT, "n_inner": 52}),
    "gpt-bigcode-heads": ("GPTBigCode", {**_GPT, "n_inner": 52, "multi_query": False}),
    "rembert": ("RemBert", {**_BERT, "input_embedding_size": 24}),
    "roformer": ("RoFormer", _BERT),
    "megatron-bert": ("MegatronBert", _BERT),
    "nemotron": ("Nemotron", _DECODER),
    "cohere": ("Cohere", {**_DECODER, "use_qk_norm": True, "eos_token_id": 0}),
    "cohere2": ("Cohere2", {**_WINDOWS, "head_dim": 8, "eos_token_id": 0}),
    "gptj": ("GPTJ", {**_GPT, "n_inner": 52, "rotary_dim": 4}),
    "codegen": ("CodeGen", {**_GPT, "n_head": 4, "n_inner": 52, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeo",
        {
            "hidden_size": 40,
            "num_layers": LAYERS,
            "attention_types": [[["local", "global"], 1]],
            "window_size": 3,
            "num_heads": 5,
            "intermediate_size": 52,
            "max_position_embeddings": POSITIONS,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "bloom": ("Bloom", {"hidden_size": 40, "n_layer": LAYERS, "n_head": 5}),
    "mpt": ("Mpt", {"d_model": 40, "n_layers": LAYERS, "n_heads": 5, "max_seq_len": POSITIONS}),
    "falcon-7b": ("Falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": (
        "Falcon",
        {**_FALCON, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True},
    ),
    "falcon-11b": (
        "Falcon",
        {**_FALCON, "num_kv_heads": 1, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "Falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "mpnet": ("MPNet", _ROBERTA),
    "deberta": ("Deberta", {**_BERT, **_DISENTANGLED}),
    "deberta-v2": ("DebertaV2", {**_BERT, **_DISENTANGLED, "position_buckets": 4, "share_att_key": True}),
    "deberta-v2-conv": ("DebertaV2", {**_BERT, "conv_kernel_size": 3, "type_vocab_size": 0}),
    "modernbert": ("ModernBert", {**_NEOX, "pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2}),
    "albert": ("Albert", {**_BERT, "embedding_size": 24, "num_hidden_layers": 3, "num_hidden_groups": 2}),
    "clip-text": ("CLIPText", {**_BERT, "bos_token_id": 2, "eos_token_id": 3}),
    "siglip-text": ("SiglipText", {**_BERT, "bos_token_id": 2, "eos_token_id": 3}),
}
_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", _IMAGE),
    "deit": ("DeiT", _IMAGE),
    "dinov2": ("Dinov2", _DINOV2),
    "dinov2-swiglu": ("Dinov2", {**_DINOV2, "use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegisters", {**_DINOV2, "num_register_tokens": 2}),
    "beit": ("Beit", {**_IMAGE, "use_relative_position_bias": True}),
    "clip-vision": ("CLIPVision", _IMAGE),
    "siglip-vision": ("SiglipVision", _IMAGE),
}
_SOUNDS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2", _SOUND),
    "wav2vec2-stable": ("Wav2Vec2", {**_SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "hubert": ("Hubert", _SOUND),
}
IMAGE_FAMILIES, SOUND_FAMILIES = tuple(_IMAGES), tuple(_SOUNDS)
_MORE |= _IMAGES | _SOUNDS
MORE_FAMILIES = tuple(_MORE)
"""That tests/test_families.py tries."""
_MODELS |= _MORE


def build(
    name: str, *, head: str = "Model", dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> nn.Module:
    """A random model in eval mode. ``overrides`` go to its configuration, ``attn_implementation`` included.

    ``head`` is the suffix of a transformers class, for instance ``ForSequenceClassification`` or ``LMHeadModel``.
    """
    prefix, settings = _MODELS[name]
    settings = {**settings, **overrides}
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why the nested-tensor path is not taken
            model = (
                _torch(prefix, settings) if prefix.startswith("Transformer") else _transformers(prefix, settings, head)
            )
        _randomise(model)
    finally:
        torch.set_rng_state(generator_state)
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        _exact_norms(model)
    return model


def ids(batch: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Token ids without special ones."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(name: str, batch: int = 2, length: int = 7, padding: str | None = None, seed: int = 1) -> dict[str, Tensor]:
    """Inputs for ``build(name)``: with ``padding`` (one of `paddings`) the last row has two padding tokens.

    Images have as many tokens as they have, whatever ``length``.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGE_FAMILIES:
        size = _MODELS[name][1]["image_size"]
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)}
    if name in SOUND_FAMILIES:
        values = torch.randn(batch, samples(length), generator=generator, dtype=torch.float64)
        if padding is None:
            return {"input_values": values}
        lengths = torch.tensor([samples(length)] * (batch - 1) + [samples(length - 2) + 1])
        return {"input_values": values, "attention_mask": (torch.arange(samples(length)) < lengths[:, None]).long()}
    valid = torch.ones(batch, length, dtype=torch.bool)
    if padding is not None:
        valid[-1, slice(2) if padding == "left" else slice(-2, None)] = False
    if name not in TORCH_FAMILIES:
        return {"input_ids": ids(batch, length, seed), "attention_mask": valid.long()}
    width = _MODELS[name][1]["d_model"]
    src = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    src = src if _MODELS[name][1]["batch_first"] else src.transpose(0, 1)
    return {"src": src} if padding is None else {"src": src, "src_key_padding_mask": ~valid}


def paddings(name: str) -> tuple[str | None, ...]:
    """The kinds of padding that a family knows."""
    if name in IMAGE_FAMILIES:
        return (None,)
    # A softmax in float32 of a mask that is finite in float64 alone makes the first tokens NaN.
    return (None, "right") if name in (*SOUND_FAMILIES, "bloom", "mpt") else (None, "left", "right")


def samples(length: int) -> int:
    """The fewest samples of which ``length`` tokens are made."""
    for kernel, stride in zip(reversed(_SOUND["conv_kernel"]), reversed(_SOUND["conv_stride"]), strict=True):
        length = (length - 1) * stride + kernel
    return length


def _transformers(prefix: str, settings: dict[str, Any], head: str) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")
    config = getattr(transformers, f"{prefix}Config")(vocab_size=VOCABULARY, **settings)
    model: nn.Module = getattr(transformers, prefix + head)(config)
    return model


def _torch(cls: str, settings: dict[str, Any]) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**settings)
    return layer if cls == "TransformerEncoderLayer" else nn.TransformerEncoder(layer, LAYERS)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.4, 1.6).mul_(torch.randint(0, 2, parameter.shape) * 2 - 1).mul_(0.7)
        else:
            parameter.normal_(std=1.4 / math.sqrt(min(parameter.shape)))


def _exact_norms(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("CohereLayerNorm", "Cohere2LayerNorm", "DebertaLayerNorm"):
                norm = nn.LayerNorm(child.weight.shape, child.variance_epsilon, bias=hasattr(child, "bias"))
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm.to(child.weight.dtype).eval())
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, nn.RMSNorm):
                eps = getattr(child, "variance_epsilon", None) or child.eps
                norm = nn.RMSNorm(child.weight.shape[0], eps=eps, dtype=child.weight.dtype)
                norm.weight = (
                    nn.Parameter(child.weight + 1) if type(child).__name__.startswith("Gemma") else child.weight
                )
                setattr(module, name, norm.eval())
