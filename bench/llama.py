"""Configurations of Llama models, and random weights for them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch

# The published shapes of Llama 3.2 1B, Llama 3.1 8B and Qwen2.5 32B, and one for tests.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 152064},
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA_8B: dict[str, Any] = {
    **_LLAMA,
    **SHAPES["8b"],
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
TINY_LLAMA: dict[str, Any] = {
    **_LLAMA,
    **SHAPES["tiny"],
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

INIT_STD = 0.02


def draw_weights(model: torch.nn.Module) -> None:
    """Draws weights from a normal distribution, the same in each process. SGLang's own dummy
    weights are so small that the output hardly depends on the prompt, which would hide a wrong
    id."""
    for name, parameter in model.state_dict().items():
        if not torch.is_floating_point(parameter) or "cos_sin_cache" in name or "inv_freq" in name:
            continue
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(zlib.crc32(name.encode()))
        parameter.normal_(0.0, INIT_STD, generator=generator)


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """Makes ``folder`` a model without weights. Loading it generates random weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
