"""A small random model of any type that transformers has, and something for it to read, for `sweep`.

Nothing here knows a model type: sizes are told by how settings are called, inputs by what ``forward`` takes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NotBuilt", "build_model", "make_inputs"]

LENGTH, BATCH, WIDTH, HEADS = 7, 2, 48, 4
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_MOST = 30_000_000
"""Parameters; a model that stays larger is one whose sizes are called otherwise."""

# What a setting is set to, by how it is called: the first rule that fits. None leaves it out, so that it follows.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"^(layer_types|block_types|mlp_layer_types|attn_type_list|window_pattern|no_rope_layers|moe_layers)$", None),
    (r"^(full_attn_idxs|attention_layers|global_attn_indexes|deepstack_visual_indexes|fullatt_block_indexes)$", None),
    (r"^(num_key_value_heads|num_kv_heads|n_head_kv|encoder_num_key_value_heads|decoder_num_key_value_heads)$", 2),
    (r"^(.*num_attention_heads|n_heads?|num_heads|.*attention_heads|encoder_num_heads|nhead|num_query_heads)$", HEADS),
    (r"^(.*num_hidden_layers|n_layers?|num_layers|.*encoder_layers|.*decoder_layers|num_blocks|depth)$", 2),
    (r"^(hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|model_dim|d_embed|encoder_hidden_size)$", WIDTH),
    (r"^(decoder_hidden_size|projection_dim|embedding_size|output_dim|proj_dim|out_hidden_size|emb_dim)$", WIDTH),
    (r"^(.*intermediate_size|.*ffn_dim|n_inner|d_ff|ffn_hidden_size|mlp_dim|d_inner|encoder_ff_dim|.*mlp_size)$", 64),
    (r"^(moe_intermediate_size.*|shared_expert_intermediate_size|expert_ffn_hidden_size)$", 20),
    (r"^(head_dim|d_kv|d_head|attention_head_dim|global_head_dim|attention_head_size)$", WIDTH // HEADS),
    (r"^(hidden_size_per_layer_input|laurel_rank)$", 8),
    (r"^num_global_key_value_heads$", 2),
    (r"^(q_lora_rank)$", 16),
    (r"^(kv_lora_rank)$", 12),
    (r"^(qk_nope_head_dim)$", 8),
    (r"^(qk_rope_head_dim)$", 4),
    (r"^(v_head_dim)$", 12),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"^(num_experts_per_tok|moe_k|moe_topk|num_experts_per_token)$", 2),
    (r"^(n_group|topk_group)$", 1),
    (r"^(first_k_dense_replace|moe_layer_start_index|num_dense_layers)$", 1),
    (r"^(vocab_size|.*_vocab_size|vocab_size_.*)$", 99),
    (r"^(max_position_embeddings|n_positions|max_seq_len|n_ctx|max_target_positions|max_source_positions)$", 64),
    (r"^(image_size|img_size|input_size)$", 32),
    (r"^(patch_size)$", 8),
    (r"^(num_mel_bins|feature_size|num_mels|input_feat_per_channel)$", 16),
    (r"^(num_frames|tubelet_size)$", 2),
    (r"^num_kv_shared_layers$", 0),
    (r"^.*_token_(id|index)$", 1),
)
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


class NotBuilt(Exception):
    """Why no small model of a type was made, or what it was to read."""


def build_model(model_type: str) -> nn.Module:
    """Builds one in float64 with random weights, in eval mode. Raises `NotBuilt`."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    mapping = transformers.MODEL_MAPPING
    if config_class not in mapping:
        raise NotBuilt("AutoModel has no class for it")
    try:
        config = config_class(**_shrink(config_class()))
        model_class = mapping[config_class]
        model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
        if count > _MOST:
            raise NotBuilt(f"a small one still has {count / 1e6:.0f} million parameters")
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        model = model_class._from_config(config)
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {_first_line(error)}") from error
    _randomise(model)
    found: nn.Module = model.double().eval()
    return found


def _shrink(config: Any) -> dict[str, Any]:
    """Returns the arguments of a configuration whose sizes are small, those inside it too."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        try:
            inner: Any = getattr(config, name, None)
        except Exception:  # of settings that layers have each for itself
            inner = value
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            found[name] = {**_shrink(inner), "model_type": inner.model_type}
            continue
        if name in _IDS:
            found[name] = _IDS[name]
            continue
        if name in _KINDS and isinstance(inner, (list, tuple)) and all(isinstance(one, str) for one in inner):
            kinds = list(dict.fromkeys(inner))  # one layer of each
            if len(kinds) > 1 and name == "layer_types":
                found |= {name: kinds, "num_hidden_layers": len(kinds)}
            continue
        if name == "image_size" and isinstance(inner, (list, tuple)) and len(inner) == 2:
            found[name] = [32, 32]
            continue
        rule = next((to for pattern, to in _RULES if re.match(pattern, name)), inner)
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(rule, int):
            found.setdefault(name, rule if value else value)
    if "qk_rope_head_dim" in found and "head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]
    return {name: value for name, value in found.items() if value is not None}


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Has nothing hide behind ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.dim() < 2 else noise / max(parameter.shape[-1], 1) ** 0.5)


def make_inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Yields what a model may take, likeliest first."""
    accepted = inspect.signature(model.forward).parameters
    text = _make_ids(accepted)
    config = model.config
    yield from (
        {name: value for name, value in given.items() if name in accepted}
        for given in (
            {**text, **_make_pixels(config), **_make_sound(config)} if model.main_input_name == "input_ids" else {},
            text,
            {**_make_pixels(config), **text},
            _make_pixels(config),
            {**_make_sound(config), **text},
            _make_sound(config),
        )
        if any(name in accepted for name in given)
    )


def _make_ids(accepted: Mapping[str, Any]) -> dict[str, Tensor]:
    if "input_ids" not in accepted:
        return {}
    ids = torch.randint(5, 90, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = ids[:, :5] + 1
    if "bbox" in accepted:
        found["bbox"] = torch.tensor([[[1, 2, 3, 4]]]).expand(BATCH, LENGTH, 4).clone()
    return found


def _make_pixels(config: Any) -> dict[str, Tensor]:
    inner = getattr(config, "vision_config", None) or config
    size = getattr(inner, "image_size", None)
    size = 32 if size is None else size
    height, width = (size, size) if isinstance(size, int) else (size if len(size) == 2 else (32, 32))
    channels = getattr(inner, "num_channels", 3)
    shape: tuple[int, ...] = (BATCH, channels if isinstance(channels, int) else 3, height, width)
    if getattr(inner, "num_frames", None):
        shape = (BATCH, int(inner.num_frames), *shape[1:])
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}


def _make_sound(config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 16
    frames = 2 * int(getattr(config, "max_source_positions", None) or 32)
    return {
        "input_features": torch.randn(BATCH, int(bins), frames, generator=generator, dtype=torch.float64),
        "input_values": torch.randn(BATCH, 4000, generator=generator, dtype=torch.float64),
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
