"""Tiny random models as GGUF files, beside stock transformers models with the same numbers.

The names and arrangements are those that llama.cpp's converter gives each architecture, written
here from the model's side: parameter to tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MiniMaxM2Config,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.gguf import dequant

from tests.checkpoints import randomize
from tests.gguf_writer import PLAIN, TYPES, Stored, gguf_bytes, random_blocks, stored

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD, LAYERS, EXPERTS, VOCAB = 256, 256, 4, 2, 64, 2, 4, 160
KEY_HEADS, VALUES_PER_KEY = 2, 4  # Of linear attention.
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
_META: dict[str, Any] = {
    "context_length": 512,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 20000.0,
    "expert_count": EXPERTS,
    "expert_used_count": 2,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    "first_k_dense_replace": 1,
    "intermediate_size": 512,
    "kv_lora_rank": 256,
    "moe_intermediate_size": WIDTH,
    "n_group": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "topk_group": 1,
    "v_head_dim": 64,
}
_MLA_META: dict[str, Any] = {
    "leading_dense_block_count": 1,
    "feed_forward_length": 512,
    "attention.kv_lora_rank": 256,
    "expert_feed_forward_length": WIDTH,
    "expert_shared_count": 2,
    "rope.dimension_count": 32,
}


@dataclass(frozen=True)
class Family:
    """How one architecture is told to transformers and to llama.cpp."""

    architecture: str
    config: Callable[..., Any]
    metadata: dict[str, Any] = field(default_factory=dict)


def _config(kind: Any, **sizes: Any) -> Callable[..., Any]:
    return lambda **more: kind(**(_SIZES | sizes | more))


FAMILIES = {
    "qwen3_moe": Family(
        "qwen3moe",
        _config(
            Qwen3MoeConfig,
            head_dim=HEAD,
            moe_intermediate_size=WIDTH,
            num_experts=EXPERTS,
            norm_topk_prob=True,
        ),
        {"attention.key_length": HEAD, "expert_feed_forward_length": WIDTH},
    ),
    "qwen2_moe": Family(
        "qwen2moe",
        _config(
            Qwen2MoeConfig,
            moe_intermediate_size=WIDTH,
            num_experts=EXPERTS,
            shared_expert_intermediate_size=512,
        ),
        {"feed_forward_length": 512},
    ),
    "gpt_oss": Family(
        "gpt-oss",
        _config(
            GptOssConfig,
            head_dim=HEAD,
            intermediate_size=WIDTH,
            num_local_experts=EXPERTS,
            sliding_window=8,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 20000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        ),
        {
            "attention.key_length": HEAD,
            "attention.sliding_window": 8,
            "expert_feed_forward_length": WIDTH,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
    ),
    "mixtral": Family(
        "llama",
        _config(MixtralConfig, intermediate_size=WIDTH, num_local_experts=EXPERTS),
        {"feed_forward_length": WIDTH, "rope.dimension_count": HEAD},
    ),
    "deepseek_v2": Family(
        "deepseek2",
        _config(DeepseekV2Config, **_MLA, q_lora_rank=None, routed_scaling_factor=1.5),
        _MLA_META
        | {"attention.key_length": 96, "attention.value_length": 64, "expert_weights_scale": 1.5},
    ),
    "deepseek_v3": Family(
        "deepseek2",
        _config(
            DeepseekV3Config,
            **_MLA,
            q_lora_rank=256,
            routed_scaling_factor=2.5,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 20000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
        _MLA_META
        | {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": 256,
            "attention.key_length": 288,
            "attention.value_length": 256,
            "attention.key_length_mla": 96,
            "attention.value_length_mla": 64,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
    ),
    "qwen3_5_moe_text": Family(
        "qwen35moe",
        _config(
            Qwen3_5MoeTextConfig,
            num_hidden_layers=4,
            head_dim=HEAD,
            moe_intermediate_size=WIDTH,
            shared_expert_intermediate_size=512,
            num_experts=EXPERTS,
            linear_conv_kernel_dim=4,
            linear_key_head_dim=32,
            linear_value_head_dim=64,
            linear_num_key_heads=KEY_HEADS,
            linear_num_value_heads=KEY_HEADS * VALUES_PER_KEY,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        ),
        {
            "block_count": 4,
            "attention.key_length": HEAD,
            "expert_feed_forward_length": WIDTH,
            "expert_shared_feed_forward_length": 512,
            "full_attention_interval": 4,
            "rope.dimension_count": HEAD // 4,
            "rope.dimension_sections": [3, 3, 2, 0],
            "ssm.conv_kernel": 4,
            "ssm.state_size": 32,
            "ssm.group_count": KEY_HEADS,
            "ssm.time_step_rank": KEY_HEADS * VALUES_PER_KEY,
            "ssm.inner_size": KEY_HEADS * VALUES_PER_KEY * 64,
        },
    ),
    "glm4_moe": Family(
        "glm4moe",
        _config(
            Glm4MoeConfig,
            attention_bias=True,
            first_k_dense_replace=1,
            head_dim=HEAD,
            intermediate_size=512,
            moe_intermediate_size=WIDTH,
            n_group=1,
            n_routed_experts=EXPERTS,
            n_shared_experts=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.0,
            topk_group=1,
            use_qk_norm=True,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
        {
            "attention.key_length": HEAD,
            "block_count": LAYERS + 1,
            "nextn_predict_layers": 1,
            "leading_dense_block_count": 1,
            "feed_forward_length": 512,
            "expert_feed_forward_length": WIDTH,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.0,
            "rope.dimension_count": HEAD // 2,
        },
    ),
    "minimax_m2": Family(
        "minimax-m2",
        _config(
            MiniMaxM2Config,
            head_dim=HEAD,
            intermediate_size=WIDTH,
            num_local_experts=EXPERTS,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
        {
            "attention.key_length": HEAD,
            "expert_feed_forward_length": WIDTH,
            "expert_gating_func": 2,
            "rope.dimension_count": HEAD // 2,
        },
    ),
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{
        f"mlp.{group}.{name}_proj": f"ffn_{name}_shexp"
        for group in ("shared_expert", "shared_experts")
        for name in ("gate", "up", "down")
    },
}
# Where the second norm is named by its place after attention.
_AFTER_ATTENTION = {"gpt_oss", "glm4_moe", "qwen3_5_moe_text"}


@dataclass(frozen=True)
class GgufModel:
    """A file's content, and a stock model with the numbers that it stands for."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    reference: Any

    def write(self, path: Path) -> Path:
        path.write_bytes(gguf_bytes(self.metadata, self.tensors))
        return path


def make_model(
    family: str, experts: str | tuple[str, ...] = "Q8_0", down: str = "", dense: str = "F32"
) -> GgufModel:
    """Make a model with experts of type `experts` (`down` for their last matrix) and `dense`.

    Several types make a model with one layer of each.
    """
    told = FAMILIES[family]
    layers = {} if isinstance(experts, str) else {"num_hidden_layers": len(experts)}
    config = told.config(**layers)
    config.dtype = "float32"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    making = _Making(family, config, torch.Generator().manual_seed(7))
    state = model.state_dict()
    for name, value in state.items():
        number = re.search(r"layers\.(\d+)\.", name)
        kind = experts if isinstance(experts, str) else experts[int(number[1]) if number else 0]
        if down and name.endswith("down_proj") and value.dim() == 3:
            kind = down
        making.add(name, value, kind if ".experts." in name else dense)
    meta = _META | told.metadata | ({"block_count": len(experts)} if layers else {})
    prefix = {f"{told.architecture}.{key}": value for key, value in meta.items()}
    metadata = {"general.architecture": told.architecture, **prefix}
    return GgufModel(metadata, making.tensors, model)


def made_from(model: Any, family: str, kind: str, extra: dict[str, Any]) -> GgufModel:
    """Write a whole stock model with all matrices of the plain type `kind`."""
    config = model.config
    making = _Making(family, config, torch.Generator())
    for name, value in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            making.add(name, value, kind)
    told = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    architecture = FAMILIES[family].architecture
    metadata = {f"{architecture}.{key}": value for key, value in told.items()}
    metadata |= {"general.architecture": architecture, **extra}
    return GgufModel(metadata, making.tensors, model)


class _Making:
    """Turns parameters into tensors, and gives them the numbers that the file can hold."""

    def __init__(self, family: str, config: Any, generator: torch.Generator) -> None:
        self._family = family
        self._config = config
        self._generator = generator
        self.tensors: dict[str, Stored] = {}

    def add(self, name: str, value: Tensor, kind: str) -> None:
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        prefix, rest = (f"blk.{block[1]}.", block[2]) if block else ("", name)
        if ".experts." in name:
            self._experts(prefix, rest.rpartition(".")[2], value, kind)
            return
        stem, _, last = rest.rpartition(".")
        leaf = _NAMES.get(rest) or f"{_NAMES[stem]}.{last}"
        if leaf == "ffn_norm.weight" and self._family in _AFTER_ATTENTION:
            leaf = "post_attention_norm.weight"
        if leaf == "attn_kv_b.weight" and self._family == "deepseek_v3":
            self._compressed(prefix, value)
            return
        file_name = prefix + leaf
        if self._family == "qwen3_5_moe_text" and self._linear(file_name, leaf, value):
            return
        if value.dim() < 2 or leaf == "ffn_gate_inp.weight" or leaf.endswith("inp_shexp.weight"):
            plain = value[0] if leaf.endswith("inp_shexp.weight") else value
            self.tensors[file_name] = stored(plain)
        else:
            order = self._turned(leaf, value)
            value[order] = self._drawn(file_name, value[order], kind).to(value.dtype)

    def _turned(self, leaf: str, value: Tensor) -> Tensor:
        """Return which row of the parameter each row of the tensor is."""
        rows = torch.arange(len(value))
        heads = {"attn_q.weight": HEADS, "attn_k.weight": KV_HEADS}.get(leaf)
        if self._family != "mixtral" or heads is None:
            return rows
        return rows.view(heads, 2, len(value) // heads // 2).transpose(1, 2).flatten()

    def _linear(self, name: str, leaf: str, value: Tensor) -> bool:
        """Write what llama.cpp changes of Qwen 3.5: norms, and heads of linear attention."""
        leaf = leaf.partition(".")[0]
        if leaf.endswith("norm") and leaf != "ssm_norm":
            self.tensors[name] = stored(value + 1)
            value.copy_((value + 1) - 1)
            return True
        if leaf == "ssm_norm" or not leaf.startswith(("ssm", "attn_qkv", "attn_gate")):
            return False
        axis = 1 if leaf == "ssm_out" else 0
        keys = 2 * KEY_HEADS * 32 if leaf in ("attn_qkv", "ssm_conv1d") else 0
        heads = value.narrow(axis, keys, value.shape[axis] - keys)
        heads = heads.unflatten(axis, (KEY_HEADS, VALUES_PER_KEY, -1))
        tiled = heads.transpose(axis, axis + 1).flatten(axis, axis + 2)
        whole = torch.cat((value.narrow(axis, 0, keys), tiled), axis)
        if leaf == "ssm_a":
            whole = -torch.exp(whole)
            value.copy_(torch.log(torch.exp(value)))
        self.tensors[name] = stored(whole.squeeze(1) if leaf == "ssm_conv1d" else whole)
        return True

    def _compressed(self, prefix: str, value: Tensor) -> None:
        keys = self._config.qk_nope_head_dim
        heads = value.view(HEADS, -1, value.shape[1])
        drawn = self._drawn(f"{prefix}attn_k_b.weight", heads[:, :keys].transpose(1, 2), "Q8_0")
        heads[:, :keys] = drawn.transpose(1, 2)
        heads[:, keys:] = self._drawn(f"{prefix}attn_v_b.weight", heads[:, keys:], "F32")

    def _experts(self, prefix: str, part: str, value: Tensor, kind: str) -> None:
        base = part.removesuffix("_bias")
        suffix = "bias" if base != part else "weight"
        if base == "gate_up_proj" and self._family == "gpt_oss":
            halves = [value[..., 0::2], value[..., 1::2]]
        elif base == "gate_up_proj":
            halves = list(value.chunk(2, dim=1))
        else:
            halves = [value]
        leaves = ("gate", "up") if len(halves) == 2 else ("down",)
        for leaf, half in zip(leaves, halves, strict=True):
            name = f"{prefix}ffn_{leaf}_exps.{suffix}"
            if suffix == "bias":
                self.tensors[name] = stored(half)
                continue
            turned = half.transpose(1, 2) if self._family == "gpt_oss" else half
            drawn = self._drawn(name, turned, kind)
            half.copy_(drawn.transpose(1, 2) if self._family == "gpt_oss" else drawn)

    def _drawn(self, name: str, value: Tensor, kind: str) -> Tensor:
        """Put numbers of about the size of `value` into the file and return them."""
        if kind in PLAIN:
            self.tensors[name] = stored(value, kind)
            return value.to(PLAIN[kind]).float()
        size = value.std().item()
        blocks = random_blocks(kind, tuple(value.shape), self._generator, size)
        self.tensors[name] = blocks
        return numbers(blocks)


def numbers(blocks: Stored) -> Tensor:
    """Return what the blocks of a quantised tensor stand for, by code that is not ours."""
    raw = torch.frombuffer(bytearray(blocks.content), dtype=torch.uint8)
    if blocks.type in ("Q5_0", "Q5_1"):
        rows = raw.view(-1, 22 if blocks.type == "Q5_0" else 24)
        scales = rows[:, :4].contiguous().view(torch.float16).float()
        bits = (rows[:, -20:-16, None].int() >> torch.arange(8) & 1).flatten(1)
        codes = torch.cat((rows[:, -16:] & 15, rows[:, -16:] >> 4), 1) + 16 * bits
        least = scales[:, 1:] if blocks.type == "Q5_1" else -16 * scales[:, :1]
        return (codes * scales[:, :1] + least).reshape(blocks.shape)
    if blocks.type == "MXFP4":
        rows = raw.view(-1, 17)
        halved = torch.tensor((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)) / 2
        codes = torch.cat((rows[:, 1:] & 15, rows[:, 1:] >> 4), 1)
        values = halved[codes.long()] * torch.exp2(rows[:, :1].float() - 127)
    else:
        values = dequant.dequantize(raw, TYPES[blocks.type][0])
    return values.reshape(blocks.shape)
