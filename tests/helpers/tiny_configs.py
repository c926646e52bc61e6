"""Configurations of small models of every supported family, for `tiny_models`."""

from __future__ import annotations

from typing import Any

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
SOUND = {
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
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
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

FAMILIES = tuple(MODELS)
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
    "olmo": ("Olmo", _DECODER),
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
    "wav2vec2": ("Wav2Vec2", SOUND),
    "wav2vec2-stable": ("Wav2Vec2", {**SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "hubert": ("Hubert", SOUND),
    "wavlm": ("WavLM", SOUND),
    "wavlm-stable": ("WavLM", {**SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
}
IMAGE_FAMILIES, SOUND_FAMILIES = tuple(_IMAGES), tuple(_SOUNDS)
_MORE |= _IMAGES | _SOUNDS
MORE_FAMILIES = tuple(_MORE)
"""That tests/test_families.py tries."""
MODELS |= _MORE

_MOE: dict[str, Any] = {**_DECODER, "num_experts_per_tok": 2}
_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**_MOE, "num_local_experts": 4}),
    "olmoe": ("Olmoe", {**_MOE, "num_experts": 5}),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "num_experts": 5, "moe_intermediate_size": 20, "head_dim": 10}),
    # One layer of two is dense.
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {**_MOE, "num_experts": 5, "moe_intermediate_size": 20, "head_dim": 10, "mlp_only_layers": [0]},
    ),
    # Adds sinks to its attention, which transformers does in its eager function alone.
    "gpt-oss": (
        "GptOss",
        {**_WINDOWS, "num_experts_per_tok": 2, "num_local_experts": 4, "swiglu_limit": 1.0}
        | {"attn_implementation": "eager"},
    ),
}
MIXTURES = tuple(_EXPERTS)
"""Mixtures of experts, that tests/test_mixture_models.py tries."""
_EXPERTS |= {
    "phimoe": ("Phimoe", {**_MOE, "num_local_experts": 4}),
    "flex-olmo": ("FlexOlmo", {**_MOE, "num_experts": 5}),
    "minimax-m2": ("MiniMaxM2", {**_MOE, "num_local_experts": 4, "head_dim": 8}),
}
MORE_MIXTURES = tuple(_EXPERTS)[len(MIXTURES) :]
"""The same layers again, which fewer tests try."""
_ROUTED = {**_MOE, "moe_intermediate_size": 20, "head_dim": 8}
_ONE_DENSE = {**_ROUTED, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
_LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
_LATENT_HEADS = {**_LATENT, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 4}
_SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    # The network beside the experts is gated by the token.
    "qwen2-moe": (
        "Qwen2Moe",
        {**_ROUTED, "num_experts": 5, "shared_expert_intermediate_size": 28, "mlp_only_layers": [0]},
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {**_ONE_DENSE, **_LATENT_HEADS, "n_shared_experts": 2, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    ),
    "deepseek-v3": ("DeepseekV3", {**_ONE_DENSE, **_LATENT_HEADS, "n_shared_experts": 1}),
    "granitemoe-shared": (
        "GraniteMoeShared",
        {**_MOE, "num_local_experts": 4, "shared_intermediate_size": 28, "residual_multiplier": 0.7},
    ),
    "llama4": (
        "Llama4Text",
        {**_MOE, "num_local_experts": 4, "intermediate_size_mlp": 28, "head_dim": 8, "interleave_moe_layer_step": 2}
        | {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0], "moe_layers": [1]},
    ),
}
SHARED_EXPERTS = tuple(_SHARED)
"""Mixtures with a network that all tokens go through."""
_SHARED |= {
    "glm4-moe": ("Glm4Moe", {**_ONE_DENSE, "n_shared_experts": 1}),
    "dots1": ("Dots1", {**_ONE_DENSE, "n_shared_experts": 2}),
    "ernie4-5-moe": (
        "Ernie4_5_Moe",
        {**_ROUTED, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1}
        | {"moe_layer_end_index": 1},
    ),
    "granitemoe": ("GraniteMoe", {**_MOE, "num_local_experts": 4, "residual_multiplier": 0.7}),
    "hunyuan-moe": ("HunYuanMoEV1", {**_MOE, "num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    "exaone-moe": (
        "ExaoneMoe",
        {**_ROUTED, "num_experts": 4, "num_shared_experts": 1, "n_group": 2, "topk_group": 1}
        | {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "solar-open": (
        "SolarOpen",
        {**_ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    ),
    "hy-v3": (
        "HYV3",
        {**_ROUTED, "num_experts": 4, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]}
        | {"enable_moe_fp32_combine": False},
    ),
    "glm4-moe-lite": (
        "Glm4MoeLite",
        {**_ONE_DENSE, **_LATENT_HEADS, "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "minicpm3": ("MiniCPM3", {**_DECODER, **_LATENT_HEADS, "scale_depth": 1.2}),
    "youtu": ("Youtu", {**_DECODER, **_LATENT_HEADS}),
}
MORE_SHARED_EXPERTS = tuple(_SHARED)[len(SHARED_EXPERTS) :]
"""The same layers again, and latent attention without experts, which fewer tests try."""
_BART = {
    "d_model": 40,
    "encoder_layers": LAYERS,
    "decoder_layers": 3,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 44,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
}
_T5 = {
    "d_model": 40,
    "d_kv": 6,
    "d_ff": 52,
    "num_layers": LAYERS,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "decoder_start_token_id": 0,
}
_SPEECH = {
    **_BART,
    "num_mel_bins": 6,
    "max_source_positions": 9,
    "max_target_positions": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
}
_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("Bart", _BART),
    "mbart": ("MBart", _BART),
    "t5": ("T5", _T5),
    "t5-gated": ("T5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "whisper": ("Whisper", _SPEECH),
}
ENCODER_DECODERS = tuple(_TWO)
"""That tests/test_encoder_decoder.py tries."""
_TWO |= {
    "marian": ("Marian", {**_BART, "decoder_start_token_id": 1}),
    "pegasus": ("Pegasus", _BART),
    "plbart": ("PLBart", _BART),
    "blenderbot": ("Blenderbot", _BART),
    "blenderbot-small": ("BlenderbotSmall", _BART),
    "m2m-100": ("M2M100", _BART),
    "mt5": ("MT5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("UMT5", _T5),
}
MORE_ENCODER_DECODERS = tuple(_TWO)[len(ENCODER_DECODERS) :]
"""The same layers again, which fewer tests try."""
MODELS |= _EXPERTS | _SHARED | _TWO

SINCE = {"swiglu_limit": "5.19"}
"""Settings that not every supported version of transformers reads. An older one is not given them."""
