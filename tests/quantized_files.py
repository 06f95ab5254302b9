"""Random checkpoints in each quantised format as its own tools write it, and what they mean.

Written from the formats' definitions, sharing no code with the reader under test: every number is
packed here bit by bit, and its meaning is computed in float64 beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import write_checkpoint
from tests.families import tiny

Packed = tuple[dict[str, Tensor], Tensor]
"""Tensors by what follows the layer's name, and the matrix (outputs, inputs) in float64."""


@dataclass(frozen=True)
class FileFormat:
    """How a checkpoint of `family` is quantised: `pack(generator, outputs, inputs)` per layer."""

    family: str
    config: dict[str, Any]
    pack: Callable[[torch.Generator, int, int], Packed]
    dtype: str = "bfloat16"
    sizes: dict[str, Any] | None = None


def integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=generator)


def scales_of(generator: torch.Generator, inputs: int, largest: float, *shape: int) -> Tensor:
    """Scales for which numbers up to `largest` give weights of the order of 1 / sqrt(inputs)."""
    return (0.5 + torch.rand(shape, generator=generator)) * 2 / largest * inputs**-0.5


def in_words(numbers: Tensor, axis: int, bits: int = 4, order: tuple[int, ...] = ()) -> Tensor:
    """Pack numbers into int32, those of `order` from the lowest bits up."""
    per_word = 32 // bits
    moved = numbers.movedim(axis, -1)
    words = torch.zeros((*moved.shape[:-1], moved.shape[-1] // per_word), dtype=torch.int64)
    for place, column in enumerate(order or range(per_word)):
        words |= moved[..., column::per_word].long() << (bits * place)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).movedim(-1, axis).contiguous()


def spread(blocks: Tensor, rows: int, columns: int, outputs: int, inputs: int) -> Tensor:
    index_rows = torch.arange(outputs) // rows
    index_columns = torch.arange(inputs) // columns
    return blocks.double()[index_rows][:, index_columns]


def fp8_numbers(generator: torch.Generator, outputs: int, inputs: int) -> Tensor:
    return (torch.randn(outputs, inputs, generator=generator) * 100).to(torch.float8_e4m3fn)


def fp8_blocks(
    rows: int, columns: int, suffix: str = "weight_scale_inv"
) -> Callable[[torch.Generator, int, int], Packed]:
    def pack(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
        weight = fp8_numbers(generator, outputs, inputs)
        grid = (-(-outputs // rows), -(-inputs // columns))
        scales = scales_of(generator, inputs, 200, *grid)
        meaning = weight.double() * spread(scales, rows, columns, outputs, inputs)
        return {"weight": weight, suffix: scales}, meaning

    return pack


def fp8_rows(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
    weight = fp8_numbers(generator, outputs, inputs)
    scales = scales_of(generator, inputs, 200, outputs, 1).bfloat16()
    return {"weight": weight, "weight_scale": scales}, weight.double() * scales.double()


def fp8_tensor(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
    weight = fp8_numbers(generator, outputs, inputs)
    scale = scales_of(generator, inputs, 200, 1)
    tensors = {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(1)}
    return tensors, weight.double() * scale.double()


def int8_rows(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
    weight = (integers(generator, 255, outputs, inputs) - 127).to(torch.int8)
    scales = scales_of(generator, inputs, 127, outputs, 1).bfloat16()
    return {"weight": weight, "weight_scale": scales}, weight.double() * scales.double()


def pack_quantized(
    group: int, zeros: bool = False, bits: int = 4
) -> Callable[[torch.Generator, int, int], Packed]:
    def pack(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
        middle = 2 ** (bits - 1)
        columns = group or inputs
        numbers = integers(generator, 2 * middle, outputs, inputs)
        scales = scales_of(generator, inputs, middle, outputs, inputs // columns).bfloat16()
        tensors = {
            "weight_packed": in_words(numbers, 1, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        zero = torch.full(scales.shape, middle)
        if zeros:
            zero = integers(generator, 2 * middle, *scales.shape)
            tensors["weight_zero_point"] = in_words(zero, 0, bits)
        centred = numbers.double() - spread(zero, 1, columns, outputs, inputs)
        return tensors, centred * spread(scales, 1, columns, outputs, inputs)

    return pack


def awq(group: int) -> Callable[[torch.Generator, int, int], Packed]:
    def pack(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
        columns = group or inputs
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        numbers = integers(generator, 16, inputs, outputs)
        zeros = integers(generator, 16, inputs // columns, outputs)
        scales = scales_of(generator, inputs, 8, inputs // columns, outputs).half()
        tensors = {
            "qweight": in_words(numbers, 1, order=order),
            "qzeros": in_words(zeros, 1, order=order),
            "scales": scales,
        }
        centred = numbers.double() - spread(zeros, columns, 1, inputs, outputs)
        return tensors, (centred * spread(scales, columns, 1, inputs, outputs)).t()

    return pack


def gptq(
    group: int, bits: int = 4, symmetric: bool = True, less: int = 1
) -> Callable[[torch.Generator, int, int], Packed]:
    def pack(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
        columns, middle = group or inputs, 2 ** (bits - 1)
        numbers = integers(generator, 2 * middle, inputs, outputs)
        zeros = integers(generator, 2 * middle, inputs // columns, outputs)
        if symmetric:
            zeros = torch.full_like(zeros, middle)
        scales = scales_of(generator, inputs, middle, inputs // columns, outputs).half()
        tensors = {
            "qweight": in_words(numbers, 0, bits),
            "qzeros": in_words((zeros - less) % (2 * middle), 1, bits),
            "scales": scales,
            "g_idx": (torch.arange(inputs) // columns).to(torch.int32),
        }
        centred = numbers.double() - spread(zeros, columns, 1, inputs, outputs)
        return tensors, (centred * spread(scales, columns, 1, inputs, outputs)).t()

    return pack


def e2m1(numbers: Tensor) -> Tensor:
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = numbers >> 3, (numbers >> 1) & 3, (numbers & 1).double()
    normal = (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return torch.where(exponent == 0, mantissa / 2, normal) * (1.0 - 2.0 * sign)


def mxfp4(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
    numbers = integers(generator, 16, outputs, inputs)
    powers = integers(generator, 3, outputs, inputs // 32) + 122
    pairs = numbers.view(outputs, inputs // 32, 16, 2)
    tensors = {
        "blocks": (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8),
        "scales": powers.to(torch.uint8),
    }
    return tensors, e2m1(numbers) * spread(2.0 ** (powers - 127), 1, 32, outputs, inputs)


def fp4_in_fp8(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
    tensors, meaning = mxfp4(generator, outputs, inputs)
    weight = tensors["blocks"].flatten(1).view(torch.int8)
    return {"weight": weight, "scale": tensors["scales"].view(torch.float8_e8m0fnu)}, meaning


def mxfp8(generator: torch.Generator, outputs: int, inputs: int) -> Packed:
    weight = fp8_numbers(generator, outputs, inputs)
    powers = integers(generator, 3, outputs, -(-inputs // 32)) + 116
    meaning = weight.double() * spread(2.0 ** (powers - 127), 1, 32, outputs, inputs)
    return {"weight": weight, "weight_scale_inv": powers.to(torch.uint8)}, meaning


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": None,
                    "observer": "minmax",
                    "dynamic": False,
                }
                | weights,
            }
        },
    }


def gptq_config(**changes: Any) -> dict[str, Any]:
    common = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    more = {"damp_percent": 0.01, "static_groups": False, "lm_head": False}
    return common | more | changes


AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 16,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [16, 16],
}
FLOAT = {"num_bits": 8, "type": "float"}
FILE_FORMATS: dict[str, FileFormat] = {
    "fp8 blocks": FileFormat("qwen3_moe", FP8_CONFIG, fp8_blocks(16, 16)),
    "fp8 blocks, deepseek": FileFormat("deepseek_v3", FP8_CONFIG, fp8_blocks(16, 16)),
    "fp8 blocks, compressed": FileFormat(
        "qwen3_moe",
        compressed("float-quantized", strategy="block", block_structure=[16, 8], **FLOAT),
        fp8_blocks(16, 8, "weight_scale"),
    ),
    "fp8 blocks, fused": FileFormat("granitemoe", FP8_CONFIG, fp8_blocks(16, 16)),
    "fp8 with fp4": FileFormat(
        "mixtral",
        FP8_CONFIG | {"expert_dtype": "fp4"},
        fp4_in_fp8,
        sizes={"intermediate_size": 64},
    ),
    "mxfp8": FileFormat(
        "qwen3_moe",
        FP8_CONFIG | {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        mxfp8,
    ),
    "fp8 rows": FileFormat(
        "qwen3_moe", compressed("float-quantized", strategy="channel", **FLOAT), fp8_rows
    ),
    "fp8 tensors": FileFormat(
        "mixtral", compressed("naive-quantized", strategy="tensor", **FLOAT), fp8_tensor
    ),
    "int8 rows": FileFormat(
        "qwen3_moe", compressed("int-quantized", strategy="channel", num_bits=8), int8_rows
    ),
    "int4 groups": FileFormat(
        "qwen3_moe", compressed("pack-quantized", group_size=16), pack_quantized(16)
    ),
    "int4 groups, zeros": FileFormat(
        "qwen3_moe",
        compressed("pack-quantized", group_size=16, symmetric=False),
        pack_quantized(16, zeros=True),
    ),
    "int4 rows": FileFormat(
        "qwen3_moe", compressed("pack-quantized", strategy="channel"), pack_quantized(0)
    ),
    "int8 groups, packed": FileFormat(
        "qwen3_moe",
        compressed("pack-quantized", group_size=16, num_bits=8, symmetric=False),
        pack_quantized(16, zeros=True, bits=8),
    ),
    "awq": FileFormat("qwen3_moe", AWQ_CONFIG, awq(16), "float16"),
    "awq rows": FileFormat("mixtral", AWQ_CONFIG | {"group_size": -1}, awq(0), "float16"),
    "gptq": FileFormat("qwen3_moe", gptq_config(), gptq(16), "float16"),
    "gptq of auto-round": FileFormat(
        "qwen3_moe",
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": 16,
            "sym": True,
        },
        gptq(16),
        "float16",
    ),
    "gptq, zeros": FileFormat(
        "qwen3_moe", gptq_config(sym=False), gptq(16, symmetric=False), "float16"
    ),
    "gptq v2, zeros": FileFormat(
        "qwen3_moe",
        gptq_config(sym=False, checkpoint_format="gptq_v2"),
        gptq(16, symmetric=False, less=0),
        "float16",
    ),
    "gptq, 8 bits": FileFormat(
        "qwen3_moe",
        gptq_config(bits=8, sym=False),
        gptq(16, bits=8, symmetric=False),
        "float16",
    ),
    "mxfp4": FileFormat(
        "gpt_oss",
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        mxfp4,
        sizes={"hidden_size": 64, "intermediate_size": 32},
    ),
}


_WHOLE_BLOCKS = {"hidden_size": 64, "moe_intermediate_size": 128}
# Held as torch's four-bit op wants them, gate and up in whole blocks of its rows.
PACKED_FORMATS: dict[str, FileFormat] = {
    "awq, whole blocks": FileFormat(
        "qwen3_moe", AWQ_CONFIG | {"group_size": 32}, awq(32), "float16", _WHOLE_BLOCKS
    ),
    "gptq, whole blocks": FileFormat(
        "qwen3_moe", gptq_config(group_size=32), gptq(32), "float16", _WHOLE_BLOCKS
    ),
    "int4 groups, whole blocks": FileFormat(
        "qwen3_moe",
        compressed("pack-quantized", group_size=32),
        pack_quantized(32),
        sizes=_WHOLE_BLOCKS,
    ),
    "int8 groups, whole blocks": FileFormat(
        "qwen3_moe",
        compressed("pack-quantized", group_size=32, num_bits=8),
        pack_quantized(32, bits=8),
        sizes=_WHOLE_BLOCKS,
    ),
}


def write_quantised(
    file_format: FileFormat,
    folder: Path,
    plain: Path | None = None,
    keep: Callable[[str], bool] = lambda name: False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Write a random checkpoint into `folder` and return its configuration without quantisation.

    `plain` gets the same model with plain weights in `dtype`; `keep` says which layers stay plain
    in both.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32}
    if file_format.family == "deepseek_v3":
        # A joint of gate and up inside a block of scales.
        sizes |= {"moe_intermediate_size": 24, "num_key_value_heads": 4}
    config = tiny(file_format.family, **sizes | (file_format.sizes or {}))
    write_checkpoint(config, folder, file_format.dtype)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(7)
    packed: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if keep(name) or not _is_linear(name, tensor, file_format):
            packed[name], meant[name] = tensor, tensor.to(dtype)
        elif tensor.dim() == 3:
            turned = file_format.family == "gpt_oss"  # (experts, inputs, outputs) in plain files
            shape = tensor.shape[:0:-1] if turned else tensor.shape[1:]
            made = [file_format.pack(generator, *shape) for _ in tensor]
            stem = f"{name}_" if turned else name.removesuffix("weight")
            for suffix in made[0][0]:
                packed[stem + suffix] = torch.stack([each[suffix] for each, _ in made])
            matrices = [matrix.t() if turned else matrix for _, matrix in made]
            meant[name] = torch.stack(matrices).to(dtype)
        else:
            parts, matrix = file_format.pack(generator, *tensor.shape)
            stem = name.removesuffix("weight")
            packed |= {stem + suffix: part for suffix, part in parts.items()}
            meant[name] = matrix.to(dtype)
    meant = {name: tensor.contiguous() for name, tensor in meant.items()}
    save_file(packed, path, {"format": "pt"})
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if plain is not None:
        plain.mkdir()
        config.dtype = dtype
        save_file(meant, plain / "model.safetensors", {"format": "pt"})
        (plain / "config.json").write_text(json.dumps(record), encoding="utf-8")
    record["quantization_config"] = file_format.config
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    return config


def _is_linear(name: str, tensor: Tensor, file_format: FileFormat) -> bool:
    if file_format.config["quant_method"] == "mxfp4":
        return tensor.dim() == 3
    words = ("_proj", ".w1.", ".w2.", ".w3.", "_linear")
    return any(word in name for word in words) and tensor.dim() > 1 and name.endswith(".weight")
