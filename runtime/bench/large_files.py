"""A checkpoint of Qwen3-30B-A3B's shape with random weights, as many layers of it as there is room.

Its router is random, so nothing may be concluded from it about caches or text: it shows that files
of that size are read, planned for and run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.config import DEFAULT_MODEL_DIR
from runtime.errors import ConfigError

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 768, 128, 8
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 4, 128, 151_936
CONTEXT_TOKENS = 40_960
EXPERT_BYTES = 3 * HIDDEN * INNER * 2
LAYER_BYTES = EXPERTS * EXPERT_BYTES
SPARE = 1.05
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_checkpoint(folder: Path, layers: int, say: Callable[[str], None]) -> None:
    """Write the model into `folder` in the hub's format, a shard per layer; keep one that is there.

    Raises:
        ConfigError: the disk has no room for it.
    """
    config = _config(layers)
    finished = folder / "config.json"
    if finished.exists() and json.loads(finished.read_text()) == config:
        return
    folder.mkdir(parents=True, exist_ok=True)
    needed_bytes = int((layers * LAYER_BYTES + 2 * VOCABULARY * HIDDEN * 2) * SPARE)
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise ConfigError(
            f"A checkpoint of {layers} layers takes {needed_bytes / 1e9:.1f} GB, and"
            f" {free_bytes / 1e9:.1f} GB are free in {folder}.",
            "Name another folder with --folder, or fewer layers with --layers.",
        )
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_shards(layers, generator)):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        say(f"Writing {name}\n")
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in _TEXT_FILES:
        if (DEFAULT_MODEL_DIR / name).exists():
            shutil.copy(DEFAULT_MODEL_DIR / name, folder / name)
    finished.write_text(json.dumps(config))


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _shards(layers: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.03, generator=generator)

    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors = {
            f"{at}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{at}.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{at}.self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}.self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
            f"{at}.self_attn.q_norm.weight": torch.ones(HEAD_DIM, dtype=torch.bfloat16),
            f"{at}.self_attn.k_norm.weight": torch.ones(HEAD_DIM, dtype=torch.bfloat16),
            f"{at}.mlp.gate.weight": random(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            inside = f"{at}.mlp.experts.{expert}"
            tensors[f"{inside}.gate_proj.weight"] = random(INNER, HIDDEN)
            tensors[f"{inside}.up_proj.weight"] = random(INNER, HIDDEN)
            tensors[f"{inside}.down_proj.weight"] = random(HIDDEN, INNER)
        yield tensors
    yield {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
