"""Every family with routed experts is run, and computes what stock computes, or is refused by name.

A few families are walked in every run, others each day; all of them with `-m families`, and
whenever transformers is not the version of the committed table.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from runtime.adapter import _NOT_OURS, IMPLEMENTATION, attach, is_experts
from runtime.adapter_config import read_config
from runtime.core import ExpertId
from runtime.device_emulated import EmulatedDevice
from runtime.errors import UnsupportedModelError
from runtime.executor import Executor
from runtime.kernels import views
from tests.checkpoints import attach_plain_runner, load, load_reference, logits
from tests.families import BOUNDS, FAMILIES, MORE_FAMILIES, make_checkpoint
from tests.family_table import (
    FOLDER,
    MARKDOWN_NAME,
    PLAIN,
    as_markdown,
    is_current,
    is_written,
    note,
    read_table,
)
from tests.machines import emulated_profile
from tests.quantized_files import (
    AWQ_CONFIG,
    FP8_CONFIG,
    FileFormat,
    awq,
    compressed,
    fp8_blocks,
    gptq,
    gptq_config,
    pack_quantized,
)

EVERY_DAY = 10
"""How many families a run walks beside those of `FAMILIES`, which others tests walk always."""

ALL = FAMILIES | MORE_FAMILIES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose what is walked today; its name says why it was chosen."""
    markers = metafunc.config.option.markexpr
    whole = re.search(r"\bfamilies\b", markers) is not None or not is_current()
    day = datetime.date.today().timetuple().tm_yday
    why = "all" if whole else f"day{day}"
    if "walked" in metafunc.fixturenames:
        names = sorted(ALL) if whole else _of_today(sorted(MORE_FAMILIES), day)
        metafunc.parametrize("walked", names, ids=[f"{why}-{name}" for name in names])
    if "packed" in metafunc.fixturenames:
        pairs = [(name, form) for name in sorted(ALL) for form in QUANTISED]
        chosen = pairs if whole else _of_today(pairs, day)
        metafunc.parametrize("packed", chosen, ids=[f"{why}-{a}-{b}" for a, b in chosen])


def _of_today(everything: list[Any], day: int) -> list[Any]:
    begin = day * EVERY_DAY % len(everything)
    return (everything + everything)[begin : begin + EVERY_DAY]


def check_family(family: str, folder: Path) -> str:
    """Assert that a stripped model gives the logits of the stock one; return how closely."""
    make_checkpoint(family, folder)
    reference = load_reference(folder, ALL[family]())
    expected = logits(reference)
    loaded = load(folder)
    assert not [name for name, p in loaded.model.named_parameters() if p.device.type == "meta"]
    experts = [name for name, module in loaded.model.named_modules() if is_experts(module)]
    assert experts == [layer.name for layer in loaded.layers]
    for layer in loaded.layers:
        weights = reference.get_submodule(layer.name)
        assert not list(layer.module.parameters(recurse=False))
        assert layer.module.config._experts_implementation == IMPLEMENTATION
        for expert in range(layer.experts):
            raw = loaded.store.bytes_of(ExpertId(layer.index, expert))
            for name, part in views(raw, layer.format).items():
                assert torch.equal(part, getattr(weights, name)[expert])
    attach_plain_runner(loaded.layers, loaded.store)
    actual = logits(loaded.model)
    loaded.store.close()
    assert all(torch.isfinite(step).all() and step.std() > 0.03 for step in expected)
    if family not in BOUNDS:
        assert torch.equal(expected[0], actual[0])
        assert torch.equal(expected[1], actual[1])
        return "bitwise"
    for ours, stock in zip(actual, expected, strict=True):
        assert float((ours - stock).abs().max()) <= BOUNDS[family] * float(stock.std())
    return f"within {BOUNDS[family]:.0e}"


@pytest.mark.families
def test_logits_are_those_of_transformers(walked: str, tmp_path: Path) -> None:
    outcome = check_family(walked, tmp_path)
    note(walked, PLAIN, outcome)
    if is_current() and not is_written():
        assert outcome == read_table()["families"][walked][PLAIN]


# Groups of 8: the small experts are 24 wide. Only experts are quantised, as the families name them.
QUANTISED = {
    "FP8": FileFormat("", FP8_CONFIG, fp8_blocks(16, 16)),
    "int4": FileFormat("", compressed("pack-quantized", group_size=8), pack_quantized(8)),
    "AWQ": FileFormat("", AWQ_CONFIG | {"group_size": 8}, awq(8), "float16"),
    "GPTQ": FileFormat("", gptq_config(group_size=8), gptq(8), "float16"),
}
_ONE_MATRIX = re.compile(r"\.experts\.\d+\.\w+\.weight$")


@pytest.mark.families
def test_quantised_experts_are_those_of_the_plain_model(
    packed: tuple[str, str], tmp_path: Path
) -> None:
    family, form = packed
    file_format = QUANTISED[form]
    folder, plain = tmp_path / "packed", tmp_path / "plain"
    make_checkpoint(family, folder, file_format.dtype)
    tensors = load_file(folder / "model.safetensors")
    if not any(_ONE_MATRIX.search(name) for name in tensors):
        pytest.skip(f"the files of {family} hold all experts of a layer in one tensor")
    generator = torch.Generator().manual_seed(7)
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if _ONE_MATRIX.search(name):
            parts, matrix = file_format.pack(generator, *tensor.shape)
            stem = name.removesuffix("weight")
            stored |= {stem + suffix: part.contiguous() for suffix, part in parts.items()}
            meant[name] = matrix.float().contiguous()
        else:
            stored[name], meant[name] = tensor, tensor.float()
    plain.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    text = (folder / "config.json").read_text(encoding="utf-8")
    (plain / "config.json").write_text(text, encoding="utf-8")
    record = json.loads(text) | {"quantization_config": file_format.config}
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    config = ALL[family]()
    config.dtype = "float32"
    expected = logits(load_reference(plain, config))
    loaded = load(folder, dtype=torch.float32)
    assert all(layer.format.matrices for layer in loaded.layers)
    attach_plain_runner(loaded.layers, loaded.store)
    actual = logits(loaded.model)
    loaded.store.close()
    assert all(torch.isfinite(step).all() and step.std() > 0.03 for step in expected)
    if all(map(torch.equal, actual, expected)):
        note(family, form, "bitwise")
        return
    for ours, theirs in zip(actual, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= ROUNDING * float(theirs.std())
    note(family, form, f"within {ROUNDING:.0e}")


ROUNDING = 1e-5
"""Products that are added in another order: of the spread of the logits."""


def modelling_text(model_type: str) -> str:
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))


_EXPERTS_CLASS = re.compile(
    r"^class \w*(?:Experts?|MoE|Moe|CDMoE)\w*\(nn\.Module|use_experts_implementation", re.MULTILINE
)
WITH_EXPERTS = [
    name for name in CONFIG_MAPPING_NAMES if _EXPERTS_CLASS.search(modelling_text(name))
]


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_every_family_with_experts_is_run_or_refused_by_name(
    model_type: str, tmp_path: Path
) -> None:
    """A new family of transformers fails here until somebody has looked at it."""
    if model_type in ALL:
        return
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=model_type) as refused:
        read_config(tmp_path)
    assert refused.value.next_step


def test_the_search_for_experts_finds_what_is_known_to_have_them() -> None:
    assert len(WITH_EXPERTS) > 100
    assert set(ALL) <= set(WITH_EXPERTS)
    assert {"dbrx", "doge", "jetmoe", "nllb-moe", "switch_transformers"} <= set(WITH_EXPERTS)
    assert "llama" not in WITH_EXPERTS


def test_every_modelling_module_with_the_interface_is_walked_or_refused() -> None:
    reached = {model_type_to_module_name(name) for name in ALL}
    refused = {model_type_to_module_name(name) for name in _NOT_OURS}
    modules = {model_type_to_module_name(name) for name in WITH_EXPERTS}
    assert modules - reached == refused - reached
    # Of these one kind is run and another refused.
    assert refused & reached == {"inkling", "qwen3_omni_moe"}
    decorated = {m for m in modules if "use_experts_implementation" in modelling_text(m)}
    assert len(decorated) >= 60
    assert {"llama4", "longcat_flash", "step3p7"} <= reached - decorated


def test_the_committed_table_is_of_the_installed_transformers() -> None:
    table = read_table()
    if not is_current():
        pytest.skip(f"made with transformers {table['transformers']}: every family is walked")
    assert {name for name, row in table["families"].items() if PLAIN in row} == set(ALL)
    assert table["refused"] == dict(sorted(_NOT_OURS.items()))
    assert (FOLDER / MARKDOWN_NAME).read_text(encoding="utf-8") == as_markdown(table)


EXCEPTIONS = ["llama4_text", "longcat_flash", "step3p7"]


@pytest.mark.parametrize("slots", [3, 16])
@pytest.mark.parametrize("family", EXCEPTIONS)
def test_families_with_an_adapter_go_through_the_executor_like_any_other(
    family: str, slots: int, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path)
    loaded = load(tmp_path)
    attach_plain_runner(loaded.layers, loaded.store)
    expected = logits(loaded.model)
    profile = emulated_profile()
    device = EmulatedDevice(profile, virtual_clock=True)
    policy = "on-demand" if slots == 3 else "prescope"
    executor = Executor(
        device, loaded.layers, loaded.store, profile, slots, policy, virtual_clock=True
    )
    asked = _count_rows(loaded.layers, executor)
    executor.begin_pass(26, span=13)
    assert all(map(torch.equal, logits(loaded.model), expected))
    counters = executor.counters()
    assert counters.routed == sum(counters.served) > 0
    # 26 tokens of the prompt and 2 after it, at most top-k experts each: never all of them.
    rows = sum(asked)
    most = 28 * loaded.layers[0].top_k * len(loaded.layers)
    assert rows < most if family == "longcat_flash" else rows == most
    executor.close()
    loaded.store.close()


def _count_rows(layers: Any, executor: Executor) -> list[int]:
    asked: list[int] = []

    def run(layer: int, hidden: Any, index: Any, weights: Any) -> Any:
        asked.append(index.numel())
        return executor.run(layer, hidden, index, weights)

    attach(layers, run)
    return asked


def test_tokens_that_choose_only_idle_experts_still_come_to_every_layer(tmp_path: Path) -> None:
    """Sequences meet at each layer: one that stayed away would break the meeting."""
    make_checkpoint("longcat_flash", tmp_path)
    loaded = load(tmp_path)
    calls = _count_plain(loaded)
    module: Any = loaded.layers[0].module
    hidden = torch.randn(2, 32)
    idle = torch.tensor([[8, 9, 11], [10, 8, 9]])
    weights = torch.tensor([[0.5, 0.25, 0.125], [1.0, 2.0, 4.0]])
    with torch.inference_mode():
        made = module(hidden, idle, weights)
    assert calls == [1]
    torch.testing.assert_close(made, hidden * weights.sum(1, keepdim=True))
    loaded.store.close()


def _count_plain(loaded: Any) -> list[int]:
    attach_plain_runner(loaded.layers, loaded.store)
    run = loaded.layers[0].module.prescope_run
    calls: list[int] = []

    def counted(layer: int, hidden: Any, index: Any, weights: Any) -> Any:
        calls.append(index.numel())
        return run(layer, hidden, index, weights)

    loaded.layers[0].module.prescope_run = counted
    return calls


def test_the_limit_of_each_layer_is_its_own(tmp_path: Path) -> None:
    make_checkpoint("step3p7", tmp_path)
    loaded = load(tmp_path)
    first, second = (layer.math.activate for layer in loaded.layers)
    wide = torch.full((1, 8), 30.0)
    assert float(first(wide).max()) > 100
    assert float(second(wide).max()) == pytest.approx(0.05**2)
    loaded.store.close()
