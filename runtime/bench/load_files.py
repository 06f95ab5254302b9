"""Random models whose experts lie in files as each format keeps them, for `bench load`.

Only sizes and layouts are those of real files: nothing here says anything about answers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.gguf_types import TYPES

TOP_K, HEAD_DIM, VOCABULARY = 4, 128, 256
_GROUP = 128
_ALIGNMENT_BYTES = 32
_HALF = 0x2C00
"""The bits of a float16 of a sixteenth, for scales."""
# Where the float16 scales of a block lie.
_HALVES = {"Q4_0": (0,), "Q4_K": (0, 2), "Q8_0": (0,)}
_COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": _GROUP,
            },
        }
    },
}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
_CONFIGS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": True},
    "compressed": _COMPRESSED,
    "fp8": _FP8,
    "mxfp4": {**_FP8, "expert_dtype": "fp4"},
}
STORED = (*_CONFIGS, *_HALVES)


@dataclass(frozen=True)
class Size:
    """Layers, experts in each, and the widths of an expert's matrices."""

    layers: int = 4
    experts: int = 32
    hidden: int = 2048
    inner: int = 768

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices of an expert, (outputs, inputs)."""
        up = (self.inner, self.hidden)
        return {"gate": up, "up": up, "down": (self.hidden, self.inner)}


def write_model(folder: Path, stored: str, size: Size) -> Path:
    """Write a Qwen3 MoE whose experts are kept as `stored`, one of `STORED`; return where it is."""
    generator = torch.Generator().manual_seed(0)
    if stored in _HALVES:
        path = folder / f"model-{stored}.gguf"
        _write_gguf(path, stored, size, generator)
        return path
    config = _config(size)
    if _CONFIGS[stored] is not None:
        config["quantization_config"] = _CONFIGS[stored]
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    shards = size.layers + 1
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        tensors = {
            f"model.{theirs}": tensor for _, theirs, tensor in _dense(number - 1, size, generator)
        }
        for expert in range(size.experts if number else 0):
            for matrix, (rows, columns) in size.shapes.items():
                stem = f"model.layers.{number - 1}.mlp.experts.{expert}.{matrix}_proj."
                for suffix, tensor in _PACKED[stored](rows, columns, generator).items():
                    tensors[stem + suffix] = tensor
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _config(size: Size) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "moe_intermediate_size": size.inner,
        "num_experts": size.experts,
        "num_experts_per_tok": TOP_K,
        "num_attention_heads": size.hidden // HEAD_DIM,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _dense(layer: int, size: Size, generator: torch.Generator) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what belongs to a layer, or to none (-1): GGUF's name, the hub's, and the weights."""
    hidden = size.hidden
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd": ("embed_tokens", (VOCABULARY, hidden)),
        "output_norm": ("norm", (hidden,)),
    }
    ours, theirs = "", ""
    if layer >= 0:
        ours, theirs = f"blk.{layer}.", f"layers.{layer}."
        shapes = {
            "attn_q": ("self_attn.q_proj", (hidden, hidden)),
            "attn_k": ("self_attn.k_proj", (2 * HEAD_DIM, hidden)),
            "attn_v": ("self_attn.v_proj", (2 * HEAD_DIM, hidden)),
            "attn_output": ("self_attn.o_proj", (hidden, hidden)),
            "attn_q_norm": ("self_attn.q_norm", (HEAD_DIM,)),
            "attn_k_norm": ("self_attn.k_norm", (HEAD_DIM,)),
            "attn_norm": ("input_layernorm", (hidden,)),
            "ffn_norm": ("post_attention_layernorm", (hidden,)),
            "ffn_gate_inp": ("mlp.gate", (size.experts, hidden)),
        }
    for gguf, (hub, shape) in shapes.items():
        yield f"{ours}{gguf}.weight", f"{theirs}{hub}.weight", _normal(generator, *shape)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.03, generator=generator)


def _bits(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    size_bytes = torch.Size(shape).numel() * dtype.itemsize
    words = torch.empty(-(-size_bytes // 8), dtype=torch.int64).random_(generator=generator)
    return words.view(torch.uint8)[:size_bytes].view(dtype).view(shape)


def _awq(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "qweight": _bits(generator, torch.int32, columns, rows // 8),
        "qzeros": _bits(generator, torch.int32, columns // _GROUP, rows // 8),
        "scales": torch.full((columns // _GROUP, rows), 0.01, dtype=torch.float16),
    }


def _gptq(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "qweight": _bits(generator, torch.int32, columns // 8, rows),
        "qzeros": torch.full((columns // _GROUP, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((columns // _GROUP, rows), 0.01, dtype=torch.float16),
        "g_idx": (torch.arange(columns) // _GROUP).to(torch.int32),
    }


def _compressed(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "weight_packed": _bits(generator, torch.int32, rows, columns // 8),
        "weight_scale": torch.full((rows, columns // _GROUP), 0.01, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _fp8(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "weight": _normal(generator, rows, columns).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.ones(rows // 128, columns // 128),
    }


def _mxfp4(rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    scales = torch.full((rows, columns // 32), 122, dtype=torch.uint8)
    return {
        "weight": _bits(generator, torch.int8, rows, columns // 2),
        "scale": scales.view(torch.float8_e8m0fnu),
    }


_PACKED: dict[str, Callable[[int, int, torch.Generator], dict[str, Tensor]]] = {
    "bf16": lambda rows, columns, generator: {"weight": _normal(generator, rows, columns)},
    "awq": _awq,
    "gptq": _gptq,
    "compressed": _compressed,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}


def _write_gguf(path: Path, kind: str, size: Size, generator: torch.Generator) -> None:
    told: dict[str, int | float | str] = {
        "general.architecture": "qwen3moe",
        "qwen3moe.context_length": 256,
        "qwen3moe.embedding_length": size.hidden,
        "qwen3moe.block_count": size.layers,
        "qwen3moe.attention.head_count": size.hidden // HEAD_DIM,
        "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": HEAD_DIM,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3moe.expert_count": size.experts,
        "qwen3moe.expert_used_count": TOP_K,
        "qwen3moe.expert_feed_forward_length": size.inner,
    }
    numbers = {name: number for number, (name, _, _) in TYPES.items()}
    _, per_block, block_bytes = TYPES[numbers[kind]]
    dense = [each for layer in range(-1, size.layers) for each in _dense(layer, size, generator)]
    tensors: list[tuple[str, str, tuple[int, ...], Tensor | None]] = [
        (name, "BF16" if weight.dim() > 1 else "F32", tuple(weight.shape), weight)
        for name, _, weight in dense
    ]
    tensors += [
        (f"blk.{layer}.ffn_{matrix}_exps.weight", kind, (size.experts, *shape), None)
        for layer in range(size.layers)
        for matrix, shape in size.shapes.items()
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(told))
    for key, value in told.items():
        header += _text(key) + _value(value)
    at = 0
    for name, type_name, shape, _ in tensors:
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", numbers[type_name], at)
        item_bytes = {"BF16": 2, "F32": 4}.get(type_name, 0)
        size_bytes = torch.Size(shape).numel() * item_bytes
        at += _up(size_bytes or torch.Size(shape).numel() // per_block * block_bytes)
    with open(path, "wb") as file:
        file.write(header.ljust(_up(len(header)), b"\0"))
        for _, type_name, shape, weight in tensors:
            if weight is None:
                blocks = torch.Size(shape).numel() // per_block
                raw = _bits(generator, torch.uint8, blocks, block_bytes)
                for begin in _HALVES[type_name]:
                    raw[:, begin : begin + 2] = torch.tensor([_HALF & 255, _HALF >> 8])
            else:
                raw = weight.float() if type_name == "F32" else weight
            data = raw.contiguous().view(torch.uint8).numpy().tobytes()
            file.write(data.ljust(_up(len(data)), b"\0"))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _value(value: int | float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def _up(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
