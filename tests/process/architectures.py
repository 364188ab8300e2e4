"""Tiny models of many architectures, built from their configurations with random weights."""

import inspect
from typing import Any

import torch

TEXT = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "phimoe", "glm4_moe", "minimax",
    "jamba", "granitemoe", "gpt_neox", "llama", "gpt2", "t5",
)  # fmt: skip
IMAGES = ("vit", "deit", "beit", "dinov2")
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    "max_position_embeddings": 32, "image_size": 16, "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "block_size": 16, "n_embd": 16, "n_layer": 2,
    "n_head": 2, "n_positions": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
}  # fmt: skip
"""Sizes by the names that the configurations have for them."""


def build(name: str) -> Any:
    """A tiny model of an architecture; its weights depend on torch's random state."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = inspect.signature(CONFIG_MAPPING[name].__init__).parameters
    config = AutoConfig.for_model(name, **{key: value for key, value in SMALL.items() if key in known})
    if name == "t5":
        config.decoder_start_token_id = 0
    auto = AutoModelForImageClassification if name in IMAGES else AutoModelForCausalLM
    found = (AutoModelForSeq2SeqLM if name == "t5" else auto)._model_mapping[type(config)]
    return (found[0] if isinstance(found, tuple) else found)(config)


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """Random training data for such a model."""
    generator = torch.Generator().manual_seed(0)
    if name in IMAGES:
        pixels = torch.randn(count, 3, 16, 16, generator=generator)
        return [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)]
    ids = torch.randint(3, 64, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]
