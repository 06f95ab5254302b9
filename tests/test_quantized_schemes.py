"""What a stranger's quantization_config may say, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.adapter_config import read_quantisation
from runtime.errors import UnsupportedModelError
from runtime.quantized_schemes import Quantisation, Scheme, quantisation_from
from tests.quantized_files import AWQ_CONFIG, FILE_FORMATS, FP8_CONFIG, compressed, gptq_config

INT4 = compressed("pack-quantized", group_size=32)


def group(**changes: Any) -> dict[str, Any]:
    record = json.loads(json.dumps(INT4))
    record["config_groups"]["group_0"] |= changes
    return dict(record)


AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "autoround_version": "0.9.0",
    "block_name_to_quantize": "model.layers",
}
READ: list[tuple[dict[str, Any], Quantisation]] = [
    (FP8_CONFIG, Quantisation("fp8", (Scheme(8, True, 16, 16),))),
    ({"quant_method": "fp8"}, Quantisation("fp8", (Scheme(8, True, 128, 128),))),
    (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        Quantisation("fp8", (Scheme(8, True, 0, 0),)),
    ),
    (
        {"quant_method": "fp8", "expert_dtype": "fp4", "scale_fmt": "ue8m0"},
        Quantisation("fp8", (Scheme(8, True, 128, 128), Scheme(4, True, 1, 32))),
    ),
    ({"quant_method": "mxfp4"}, Quantisation("mxfp4", (Scheme(4, True, 1, 32),))),
    (AWQ_CONFIG, Quantisation("awq", (Scheme(4, columns=16, zeros=True),))),
    (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"},
        Quantisation("awq", (Scheme(4, columns=128, zeros=True),)),
    ),
    (gptq_config(), Quantisation("gptq", (Scheme(4, columns=16, zeros_less_one=True),))),
    (
        gptq_config(sym=False, group_size=-1, checkpoint_format="gptq_v2"),
        Quantisation("gptq", (Scheme(4, zeros=True),)),
    ),
    (
        gptq_config(dynamic={"-:.*gate.*": {}}, some_new_switch=False),
        Quantisation("gptq", (Scheme(4, columns=16, zeros_less_one=True),)),
    ),
    (INT4, Quantisation("compressed-tensors", (Scheme(4, columns=32),))),
    (AUTO_ROUND, Quantisation("gptq", (Scheme(4, columns=128, zeros_less_one=True),))),
    (
        AUTO_ROUND
        | {"packing_format": "auto_round:auto_awq", "sym": False}
        | {"extra_config": {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"}}},
        Quantisation("awq", (Scheme(4, columns=128, zeros=True),)),
    ),
]
REFUSED: list[tuple[Any, str]] = [
    ("fp8", "not an object"),
    ({}, "unnamed kind"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"quant_method": ["awq"]}, r"\['awq'\]"),
    ({"quant_method": "x" * 10**6}, "xxx"),
    (FP8_CONFIG | {"weight_block_size": [128]}, "weight_block_size"),
    (FP8_CONFIG | {"weight_block_size": [0, 128]}, "weight_block_size"),
    (FP8_CONFIG | {"weight_block_size": "128"}, "weight_block_size"),
    (FP8_CONFIG | {"weight_block_size": [128, 2**40]}, "weight_block_size"),
    (FP8_CONFIG | {"fmt": "e5m2"}, "fmt = e5m2"),
    (FP8_CONFIG | {"expert_dtype": "fp2"}, "expert_dtype = fp2"),
    (FP8_CONFIG | {"rotate": "hadamard"}, "rotate = hadamard"),
    (AWQ_CONFIG | {"bits": 3}, "bits = 3"),
    (AWQ_CONFIG | {"bits": "4"}, "bits = 4"),
    (AWQ_CONFIG | {"bits": True}, "bits = True"),
    (AWQ_CONFIG | {"group_size": 0}, "group_size = 0"),
    (AWQ_CONFIG | {"group_size": 10**12}, "group_size"),
    (AWQ_CONFIG | {"version": "gemv"}, "only the gemm layout"),
    (AWQ_CONFIG | {"zero_point": False}, "zero_point"),
    (gptq_config(desc_act=True), "desc_act = True.*act-order"),
    (gptq_config(desc_act=1), "desc_act = 1"),
    (gptq_config(actorder=True), "actorder = True.*act-order"),
    (gptq_config(bits=3), "bits = 3"),
    (gptq_config(bits=None), "bits = None"),
    (gptq_config(checkpoint_format="marlin"), "marlin"),
    (gptq_config(is_marlin_format=True), "is_marlin_format"),
    (gptq_config(dynamic={"+:.*": {"bits": 8}}), "dynamic"),
    (AUTO_ROUND | {"sym": False}, "sym = False"),
    ({key: AUTO_ROUND[key] for key in AUTO_ROUND if key != "sym"}, "sym = False"),
    (AUTO_ROUND | {"packing_format": None}, "packing_format = None"),
    (AUTO_ROUND | {"packing_format": "auto_round:llm_compressor"}, "packing_format"),
    (AUTO_ROUND | {"data_type": "nv_fp"}, "data_type = nv_fp"),
    (AUTO_ROUND | {"extra_config": {"a": {"bits": 8}}}, "extra_config"),
    (AUTO_ROUND | {"extra_config": ["a"]}, "extra_config"),
    (AUTO_ROUND | {"act_bits": 8}, "act_bits = 8"),
    (compressed("nvfp4-pack-quantized", group_size=16), "nvfp4-pack-quantized"),
    (compressed("marlin-24", group_size=16), "marlin-24"),
    (compressed("pack-quantized", group_size=16, num_bits=3), "num_bits = 3"),
    (compressed("pack-quantized", group_size=16, actorder="group"), "actorder = group.*act-order"),
    (compressed("pack-quantized", group_size=0), "group_size = 0"),
    (compressed("pack-quantized", group_size=16, strategy="tensor_group"), "strategy"),
    (compressed("float-quantized", strategy="block", num_bits=8), "block_structure"),
    (INT4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (INT4 | {"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
    (INT4 | {"config_groups": {}}, "config_groups"),
    (INT4 | {"config_groups": {"W4A16": ["Linear"]}}, "presets"),
    (group(weights=None), "weights"),
    (group(format="mxfp4-pack-quantized"), "mxfp4-pack-quantized"),
    (group(lora="x"), "lora = x"),
]


@pytest.mark.parametrize(("record", "expected"), READ, ids=lambda value: str(value)[:40])
def test_what_is_known_becomes_a_small_record(
    record: dict[str, Any], expected: Quantisation
) -> None:
    assert quantisation_from(record) == expected


@pytest.mark.parametrize(("record", "named"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_not_known_is_refused_by_name(record: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as refused:
        quantisation_from(record)
    assert len(refused.value.message) < 500
    assert refused.value.next_step


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
GOOD = [AUTO_ROUND, *(each.config for each in FILE_FORMATS.values())]


@given(st.data())
def test_junk_anywhere_is_read_or_refused_and_never_crashes(data: st.DataObject) -> None:
    record = json.loads(json.dumps(data.draw(st.sampled_from(GOOD))))
    owner: Any = record
    while True:
        key = data.draw(st.sampled_from(sorted(owner)))
        if isinstance(owner[key], dict) and owner[key] and data.draw(st.booleans()):
            owner = owner[key]
            continue
        owner[key] = data.draw(JUNK)
        break
    with contextlib.suppress(UnsupportedModelError):
        assert quantisation_from(record).schemes


def test_it_is_found_at_the_top_or_in_the_text_model_but_not_in_two_versions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.json"

    def write(record: dict[str, Any]) -> None:
        path.write_text(json.dumps(record), encoding="utf-8")

    write({"model_type": "qwen3_moe"})
    assert read_quantisation(tmp_path) is None
    write({"quantization_config": AWQ_CONFIG})
    found = read_quantisation(tmp_path)
    assert found is not None
    assert found.method == "awq"
    write({"text_config": {"quantization_config": AWQ_CONFIG}})
    assert read_quantisation(tmp_path) == found
    write({"text_config": {"quantization_config": AWQ_CONFIG}, "quantization_config": FP8_CONFIG})
    with pytest.raises(UnsupportedModelError, match="several ways"):
        read_quantisation(tmp_path)
