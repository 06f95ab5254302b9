"""A plan changes when and where a quantised expert is computed, never its rows.

Whole models with quantised experts in bfloat16, so that the packed products and the dequantising
ones both run, under policies that compute on the emulated card and on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.core import ExpertId, PolicyName
from runtime.device_emulated import EmulatedDevice
from runtime.device_host import HostDevice
from runtime.executor import Executor
from runtime.formats import ExpertFormat, Form
from runtime.kernels import views
from runtime.kernels_quantised import has_packed_op
from runtime.loader import LoadedModel
from runtime.store import ExpertStore, LayerSource, bytes_in
from runtime.weight_forms import form_for
from tests.checkpoints import attach_plain_runner, load
from tests.families import make_checkpoint
from tests.machines import emulated_profile
from tests.weight_codes import FORMS, laid_out, random_codes

PROMPT = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
NEXT = torch.randint(3, 90, (2, 1), generator=torch.Generator().manual_seed(4))
PROFILE = emulated_profile()
FAMILIES = ("qwen3_moe", "gpt_oss")  # (out, in) without biases; transposed with biases
HELD = {
    "int4": Form("int4", 1, 32, zeros=True),
    "int8 rows": FORMS["int8 rows"],
    "int8 groups": FORMS["int8 groups"],
    "fp8": Form("fp8", 16, 32),
    "mxfp4": FORMS["mxfp4"],
}


class NoFiles:
    """Files that nobody reads: the experts come from a source of their own."""

    tensors: Mapping[str, Any] = MappingProxyType({})
    cached = True

    def read(self, reads: Sequence[tuple[str, int, memoryview]]) -> None:
        raise AssertionError(reads)

    def read_past_cache(self, on: bool) -> None:
        """There is no cache."""

    def close(self) -> None:
        """There is nothing open."""


class RandomExperts:
    """A source of experts that are random codes of one form, with the biases of a model."""

    def __init__(self, loaded: LoadedModel, form: Form) -> None:
        self._form = form_for(form, torch.bfloat16)
        self._loaded = loaded
        self.layers = [
            LayerSource(self._made(ExpertId(layer.index, 0))[0], ((),) * layer.experts)
            for layer in loaded.layers
        ]

    def read(self, expert: ExpertId, into: memoryview) -> None:
        into[:] = bytes_in(self._made(expert)[1])

    def close(self) -> None:
        """There is nothing open."""

    def _made(self, at: ExpertId) -> tuple[ExpertFormat, torch.Tensor]:
        layer = self._loaded.layers[at.layer]
        codes, rest = {}, {}
        for name, tensor in views(self._loaded.store.bytes_of(at), layer.format).items():
            if tensor.dim() == 2:
                shape = tensor.shape[::-1] if layer.math.transposed else tensor.shape
                seed = 100 * at.layer + 10 * at.expert + len(codes)
                drawn = random_codes(self._form, (shape[0], shape[1]), seed)
                codes[name] = replace(drawn, form=self._form)
            else:
                rest[name] = tensor
        return laid_out(codes, rest)


@contextmanager
def held(
    loaded: LoadedModel,
    form: Form,
    ram_experts: int | None = None,
    allocate_host: Callable[[int], torch.Tensor] = lambda size: torch.zeros(
        size, dtype=torch.uint8
    ),
) -> Iterator[ExpertStore]:
    source = RandomExperts(loaded, form)
    store = ExpertStore(
        NoFiles(),
        source.layers,
        source=source,
        allocate_host=allocate_host,
        progress=lambda step: None,
        cancelled=lambda: False,
        ram_experts=ram_experts,
    )
    try:
        yield store
    finally:
        store.close()


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = make_checkpoint(request.param, tmp_path_factory.mktemp("model"), "bfloat16")
    model = load(folder, dtype=torch.bfloat16)
    yield model
    model.store.close()


@contextmanager
def executing(
    loaded: LoadedModel, store: ExpertStore, policy: PolicyName, slots: int, few_tokens: int
) -> Iterator[Executor]:
    layers = [replace(layer, format=store.format_of(layer.index)) for layer in loaded.layers]
    device = HostDevice() if policy == "cpu-only" else EmulatedDevice(PROFILE, virtual_clock=True)
    executor = Executor(
        device,
        layers,
        store,
        PROFILE,
        slots,
        policy,
        virtual_clock=True,
        few_tokens=lambda layout: few_tokens,
    )
    attach(loaded.layers, executor.run)
    try:
        yield executor
    finally:
        executor.close()


def logits_of(loaded: LoadedModel, executor: Executor | None = None) -> list[torch.Tensor]:
    with torch.inference_mode():
        if executor is not None:
            executor.begin_pass(PROMPT.numel(), span=PROMPT.shape[1])
        first = loaded.model(input_ids=PROMPT, use_cache=True)
        if executor is not None:
            executor.begin_pass(NEXT.numel())
        past = first.past_key_values
        second = loaded.model(input_ids=NEXT, past_key_values=past, use_cache=True)
    return [first.logits, second.logits]


@pytest.mark.parametrize("few_tokens", [0, 4, 1000])
@pytest.mark.parametrize("name", HELD)
def test_every_plan_gives_the_same_bits(loaded: LoadedModel, name: str, few_tokens: int) -> None:
    results = {}
    plans: list[tuple[PolicyName, int, int | None]] = [
        ("on-demand", loaded.shape.top_k, None),
        ("cpu-miss", 3, None),
        ("hybrid", loaded.shape.expert_count // 3, None),
        ("on-demand", 3, loaded.shape.expert_count // 2),
        ("cpu-only", 0, None),
    ]
    for policy, slots, ram_experts in plans:
        with (
            held(loaded, HELD[name], ram_experts) as store,
            executing(loaded, store, policy, slots, few_tokens) as executor,
        ):
            results[policy, ram_experts] = logits_of(loaded, executor)
            counters = executor.counters()
            assert counters.routed == sum(counters.served) > 0
            if policy == "on-demand":
                assert counters.served_cpu == 0
                assert counters.link_bytes_issued % store.format_of(0).size_bytes == 0
            if policy == "cpu-only":
                assert counters.served_cpu == counters.routed
    reference = results["on-demand", None]
    assert all(torch.isfinite(each).all() and each.float().std() > 1e-3 for each in reference)
    for plan, logits in results.items():
        for ours, theirs in zip(logits, reference, strict=True):
            assert torch.equal(ours, theirs), plan


def test_every_form_has_both_ways_here(loaded: LoadedModel) -> None:
    """The comparison above must have run the packed products and the fused ones."""
    for form in HELD.values():
        with held(loaded, form) as store:
            matrices = store.format_of(0).matrices
            assert any(has_packed_op(matrix, torch.bfloat16) for matrix in matrices), form


def test_what_is_held_decides_the_logits(loaded: LoadedModel) -> None:
    """The comparison above must not hold because experts do not matter."""
    logits = []
    for name in ("int4", "mxfp4"):
        with (
            held(loaded, HELD[name]) as store,
            executing(loaded, store, "on-demand", 4, 4) as executor,
        ):
            logits.append(logits_of(loaded, executor)[0])
    assert not torch.equal(*logits)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_model_quantised_on_the_way_stays_near_its_reference(kind: Any, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "m", "bfloat16")
    opened = load(folder, dtype=torch.bfloat16, experts=kind)
    attach_plain_runner(opened.layers, opened.store)
    reference = logits_of(opened)
    device = EmulatedDevice(PROFILE, virtual_clock=True)
    executor = Executor(
        device, opened.layers, opened.store, PROFILE, 5, "hybrid", virtual_clock=True
    )
    attach(opened.layers, executor.run)
    try:
        ours = logits_of(opened, executor)
    finally:
        executor.close()
        opened.store.close()
    for mine, theirs in zip(ours, reference, strict=True):
        spread = theirs.float().std()
        assert (mine.float() - theirs.float()).abs().max() < 0.1 * spread
