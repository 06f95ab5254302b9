"""Sizes of the models that `bench policies` simulates; how they route is `runtime.synthetic`'s.

Expert bytes are those of files people run (Q4_K_M, Q8_0, MXFP4), and 16 bits for the PreScope
paper's setting. Dense weights are counted from the published shapes: attention, router, shared
experts and the output head, all read for every pass; quantised files keep them at about 8.5 bits,
gpt-oss in 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BITS_8 = 8.5 / 8
BITS_16 = 2.0


@dataclass(frozen=True)
class BenchModel:
    """One model in one format. `routing` names its statistics; layers are MoE layers."""

    routing: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_weights: int
    expert_bytes: int
    dense_bytes: int

    @property
    def weight_bits(self) -> float:
        return 8 * self.expert_bytes / self.expert_weights

    @property
    def layer_dense_bytes(self) -> int:
        return self.dense_bytes // self.layers

    @property
    def lookahead_bytes(self) -> int:
        """What a layer reads to guess two layers' experts: their routers, in 16 bits."""
        return 2 * 2 * self.experts * self.hidden

    @property
    def experts_bytes(self) -> int:
        """The bytes of all its experts."""
        return self.layers * self.experts * self.expert_bytes


def _model(
    routing: str,
    shape: tuple[int, int, int],
    expert: tuple[int, int],
    expert_bytes: float | None,
    dense_weights: float,
    dense_bytes_per_weight: float,
) -> BenchModel:
    """`expert` is (hidden, intermediate) of its three matrices; no bytes given means 16 bits."""
    hidden, intermediate = expert
    weights = 3 * hidden * intermediate
    size = int(2 * weights if expert_bytes is None else expert_bytes)
    dense_bytes = int(dense_weights * dense_bytes_per_weight)
    return BenchModel(routing, *shape, hidden, weights, size, dense_bytes)


_QWEN3 = ("Qwen3-30B-A3B", (48, 128, 8), (2048, 768))
_MIXTRAL = ("Mixtral-8x7B", (32, 8, 2), (4096, 14336))
_DEEPSEEK = ("DeepSeek-V2-Lite", (26, 64, 6), (2048, 1408))

MODELS: Mapping[str, BenchModel] = {
    "OLMoE 4-bit": _model("OLMoE", (16, 64, 8), (2048, 1024), 3.81e6, 0.373e9, BITS_8),
    "gpt-oss-20b": _model("gpt-oss-20b", (24, 32, 4), (2880, 2880), 13.25e6, 1.216e9, BITS_16),
    "gpt-oss-120b": _model("gpt-oss-120b", (36, 128, 4), (2880, 2880), 13.25e6, 1.55e9, BITS_16),
    "Qwen3-30B-A3B 4-bit": _model(*_QWEN3, 2.86e6, 1.23e9, BITS_8),
    "Mixtral-8x7B 4-bit": _model(*_MIXTRAL, 106.7e6, 1.474e9, BITS_8),
    "DeepSeek-V2-Lite 8-bit": _model(*_DEEPSEEK, 9.19e6, 1.103e9, BITS_8),
    "Qwen3-30B-A3B bf16": _model(*_QWEN3, None, 1.23e9, BITS_16),
    "Mixtral-8x7B bf16": _model(*_MIXTRAL, None, 1.474e9, BITS_16),
    "DeepSeek-V2-Lite bf16": _model(*_DEEPSEEK, None, 1.103e9, BITS_16),
}
