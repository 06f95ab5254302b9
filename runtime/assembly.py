"""From a load request to an engine that answers: probe, plan, open, load, wire up.

The one place where every room meets. Heavy imports are inside, so that a process can greet its app
before torch is read from disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from runtime.config import DEFAULT_MODEL, cpu_threads, data_dir, model_folder, model_name
from runtime.core import LoadProgress, LoadRequest, TelemetrySnapshot
from runtime.errors import CancelledError, MemoryPlanError, UnsupportedModelError
from runtime.expert_file_header import FOLDER as EXPERTS_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from runtime.core import HardwareProfile, MemoryPlan, ModelShape, PolicyName
    from runtime.engine import Engine
    from runtime.executor import Executor
    from runtime.hot_experts import HotExperts
    from runtime.loader import LoadedModel
    from runtime.predictor_open import LearningPredictor

DEFAULT_POLICY: PolicyName = "prescope"
PREDICTORS_FOLDER = "predictors"
DIGESTS_NAME = "digests.json"
_LOOK_S = 0.05
"""How often a person who cancels is looked for."""

log = logging.getLogger("prescope.assembly")


def assemble(
    request: LoadRequest,
    *,
    progress: Callable[[LoadProgress], None] = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
    publish: Callable[[TelemetrySnapshot], None] = lambda snapshot: None,
    virtual_clock: bool = False,
    data: Path | None = None,
    beside: bool = False,
) -> Engine:
    """Load a model as asked and return its engine; on failure everything is given back.

    Where memory runs out although the plan fitted, everything is given back and a smaller plan is
    tried; the engine's remarks say so. `virtual_clock` lets an emulated card run on modelled time
    alone. `data` is the data folder, the system's own unless given. `beside` says that another
    engine keeps its memory meanwhile: then nothing is given up for lack of it.

    Raises:
        ModelError, MemoryPlanError, ConfigError: the request cannot be carried out.
        CancelledError: `cancelled` returned True.
    """
    progress(LoadProgress("Starting the engine"))
    import psutil
    import torch

    from runtime.disk_probe import with_disk
    from runtime.file_digests import verify_files
    from runtime.hardware import driver_version
    from runtime.hardware_memory import give_back_memory
    from runtime.hardware_pinning import with_pinnable
    from runtime.loader import ran_out_of_memory, read_shape
    from runtime.planner import plan_memory
    from runtime.planner_steps import shortened, smaller_plans
    from runtime.profiles_file import keep_profile

    folder = model_folder(request.model)
    profile = with_disk(profile_for(request), folder)
    # What the emulated card computes is charged to its ledger: one thread is enough for that. In
    # place, experts get all real cores.
    cores = psutil.cpu_count(logical=False) or 1
    torch.set_num_threads(1 if profile.emulated else cpu_threads(cores))
    data = data or data_dir()
    keep_profile(profile, data)
    shape = read_shape(folder, dtype_for(profile), request.experts, half_for(profile))
    shape = replace(shape, name=model_name(folder))
    planned = partial(
        plan_memory,
        shape=shape,
        cache_fraction=request.cache_fraction,
        vram_bytes=request.vram_bytes,
    )
    plan = planned(profile)
    # Beside another engine, what that has pinned would be taken for the driver's refusal.
    if profile.device_kind == "cuda" and not beside:
        progress(LoadProgress("Asking the driver how much memory can be pinned"))
        on_card_bytes = plan.used_bytes - plan.reserve_bytes
        profile = with_pinnable(
            profile, plan.pinned_bytes, on_card_bytes, driver_version, data, cancelled=cancelled
        )
        keep_profile(profile, data)
        plan = planned(profile)
    if beside and plan.ram_experts is not None:
        raise MemoryPlanError(plan.notes[0], "Unload the other model first.")
    # Hashing takes minutes: only what can be run and fits is worth them.
    verify_files(folder, data / DIGESTS_NAME, progress, cancelled)
    plans = [plan] if beside else [plan, *smaller_plans(plan, shape)]
    reasons: list[str] = []
    for attempt in plans:
        if reasons:
            text = f"Memory ran out; trying again with {shortened(attempt, shape)}"
            log.warning("%s: %s", text, reasons[-1])
            progress(LoadProgress(text))
        try:
            return _build(
                request,
                profile,
                _remembering(attempt, plan, shape, reasons),
                folder,
                shape,
                progress=progress,
                cancelled=cancelled,
                publish=publish,
                virtual_clock=virtual_clock,
                data=data,
            )
        except (MemoryPlanError, MemoryError, RuntimeError) as failure:
            if not (isinstance(failure, MemoryPlanError) or ran_out_of_memory(failure)):
                raise
            # Only the words are kept: the error itself holds on to what was allocated.
            reasons.append(str(failure)[:300])
        give_back_memory()
    raise MemoryPlanError(
        f"{model_name(folder)} needs more memory than there is, even with"
        f" {shortened(plans[-1], shape)}. {reasons[-1]}",
        "Close other programs, lower the VRAM limit in the settings, or choose a smaller model.",
    )


def _remembering(
    attempt: MemoryPlan, plan: MemoryPlan, shape: ModelShape, reasons: Sequence[str]
) -> MemoryPlan:
    """Return the plan with a note of what was given up, if anything was."""
    from runtime.planner_steps import shortened

    if not reasons:
        return attempt
    note = (
        f"Memory ran out while loading ({reasons[0]}), so the model was loaded with"
        f" {shortened(attempt, shape)} instead of {shortened(plan, shape)}."
    )
    return replace(attempt, notes=(*attempt.notes, note))


def _build(
    request: LoadRequest,
    profile: HardwareProfile,
    plan: MemoryPlan,
    folder: Path,
    shape: ModelShape,
    *,
    progress: Callable[[LoadProgress], None],
    cancelled: Callable[[], bool],
    publish: Callable[[TelemetrySnapshot], None],
    virtual_clock: bool,
    data: Path,
) -> Engine:
    """Open the device, load the model and wire everything up, all within `plan`."""
    from runtime.adapter import attach, detach
    from runtime.adapter_cache import KvCache
    from runtime.device_choice import open_device
    from runtime.engine import Engine
    from runtime.engine_parts import EngineParts
    from runtime.executor import Executor
    from runtime.hardware_memory import give_back_memory
    from runtime.kernels_crossover import Crossovers, assumed_few_tokens
    from runtime.loader import load_model
    from runtime.prompts_templates import Templates, settle_template
    from runtime.rehearsal import rehearse

    # Without a card there are no slots, and only one thing can be done.
    policy = (request.policy or DEFAULT_POLICY) if plan.slots else "cpu-only"
    with ExitStack() as undo:
        rehearsals = ThreadPoolExecutor(1, "prescope-rehearsal")
        undo.callback(rehearsals.shutdown, wait=False)
        # Beside the loading, and whatever serves first: another policy may be chosen in an answer.
        rehearsal = rehearsals.submit(rehearse, profile) if plan.slots else None
        device = open_device(profile, plan, virtual_clock=virtual_clock)
        undo.callback(device.close)
        loaded = load_model(
            folder,
            torch_device=device.torch_device,
            dtype=dtype_for(profile),
            half=half_for(profile),
            allocate_host=device.allocate_host,
            progress=progress,
            cancelled=cancelled,
            experts=request.experts,
            kept=data / EXPERTS_FOLDER,
            release_host=device.release_host,
            ram_experts=plan.ram_experts,
            shape=shape,
        )
        undo.callback(loaded.store.close)
        for remark in loaded.remarks:
            log.warning("%s", remark)
        templates = Templates()
        undo.callback(templates.close)
        told = settle_template(templates, loaded.tokenizer) if loaded.tokenizer else None
        if loaded.tokenizer is None or not loaded.tokenizer.chat_template:
            raise UnsupportedModelError(
                f"{model_name(folder)} has no tokenizer with a chat template, so it cannot chat."
                + (f" {told}" if told else ""),
                "Choose the model's instruct or chat variant.",
            )
        # Figures of a virtual clock must not depend on what this machine learned.
        learned = None if virtual_clock else data / PREDICTORS_FOLDER
        predictor = _predictor(loaded, folder, learned) if plan.slots else None
        executor = Executor(
            device,
            loaded.layers,
            loaded.store,
            profile,
            plan.slots,
            policy,
            virtual_clock=virtual_clock,
            predictor=predictor,
            eviction=request.eviction,
            hot=_hot_experts(loaded.shape, predictor, learned),
            few_tokens=assumed_few_tokens if virtual_clock else Crossovers(data).few_tokens,
        )
        undo.callback(executor.close)
        executor.set_prediction(request.prediction)
        read_bytes = loaded.store.ram_bytes
        progress(LoadProgress("Filling the expert cache", read_bytes, read_bytes))
        executor.preload(cancelled)
        if rehearsal is not None:
            if not rehearsal.done():
                progress(LoadProgress("Preparing the first answer", read_bytes, read_bytes))
            _wait_for(rehearsal, cancelled)
        rehearsals.shutdown()
        undo.pop_all()
    give_back_memory()

    def close() -> None:
        detach(loaded.layers)
        executor.close()
        loaded.store.close()
        templates.close()
        give_back_memory()

    config = loaded.model.config
    engine = Engine(
        EngineParts(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            shape=replace(loaded.shape, name=model_name(folder)),
            context_tokens=loaded.context_tokens,
            eos_token_ids=frozenset(loaded.eos_token_ids),
            new_cache=lambda: KvCache(config),
            device=device,
            executor=executor,
            profile=profile,
            plan=plan,
            close=close,
            remarks=(*plan.notes, *device.notes, *loaded.remarks, *([told] if told else [])),
            render=templates.render,
            watch_ram=_watching_ram(executor, loaded, profile),
        ),
        publish,
    )

    attach(loaded.layers, engine.experts)
    engine.announce()
    return engine


def _wait_for(rehearsal: Future[None], cancelled: Callable[[], bool]) -> None:
    """Wait until all is compiled that decides: seconds after an update, long done otherwise."""
    while not wait([rehearsal], _LOOK_S).done:
        if cancelled():
            raise CancelledError("Loading was stopped.")
    rehearsal.result()


def _predictor(loaded: LoadedModel, folder: Path, learned: Path | None) -> LearningPredictor:
    """Return a predictor for a loaded model: its own routers, what ships with it, what was
    learned here before. Files that cannot be used are named in the log."""
    from runtime.adapter_routers import survey_routers
    from runtime.predictor_open import LearningPredictor

    survey = survey_routers(loaded.model, loaded.layers)
    for layer, reason in enumerate(survey.reasons):
        if reason:
            log.info("layer %d is not foreseen by its router: %s", layer, reason)
    dtype = next(loaded.model.parameters()).dtype
    predictor = LearningPredictor(survey.views, survey.embedding, dtype, folder, learned)
    for notice in predictor.notices:
        log.warning("%s", notice)
    return predictor


def _hot_experts(
    shape: ModelShape, predictor: LearningPredictor | None, learned: Path | None
) -> HotExperts:
    """Return the counts that say who gets the first slots: with what was learned here before."""
    from runtime.hot_experts import HotExperts

    if predictor is None or learned is None:
        return HotExperts(shape.experts, None)
    return HotExperts(shape.experts, learned / f"hot-{predictor.fingerprint}.json")


def _watching_ram(
    executor: Executor, loaded: LoadedModel, profile: HardwareProfile
) -> Callable[[], None]:
    """Return what makes room for other programs between two forward passes."""
    from runtime.engine_ram import WATCHED_FROM_BYTES, RamWatch
    from runtime.hardware_memory import read_ram
    from runtime.ram_tier_pressure import RamPressure

    store, memory = loaded.store, read_ram()
    if not store.resizable or store.ram_bytes < WATCHED_FROM_BYTES or memory.free_bytes <= 0:
        return lambda: None
    least = min(2 * loaded.shape.top_k, store.most_experts)
    pressure = RamPressure(
        memory.total_bytes,
        memory.free_bytes,
        store.slot_bytes,
        most=store.most_experts,
        least=least,
    )
    return RamWatch(executor, pressure, lambda: read_ram().free_bytes)


def profile_for(request: LoadRequest) -> HardwareProfile:
    """Probe this machine; without a card, only the default model gets an emulated one.

    A link rate in the request replaces the probed one.
    """
    from runtime.core import Reading
    from runtime.hardware import probe

    emulated = request.emulated if request.model == DEFAULT_MODEL else None
    profile = probe(emulated)
    if request.link_bytes_per_s is not None:
        rate = Reading(request.link_bytes_per_s, "emulated" if profile.emulated else "assumed")
        profile = replace(profile, link_bytes_per_s=rate, link_unpinned_bytes_per_s=rate)
    if request.ram_bytes is not None:
        known_bytes = profile.ram_free_bytes if profile.ram_total_bytes > 0 else request.ram_bytes
        free_bytes = min(request.ram_bytes, known_bytes)
        total_bytes = profile.ram_total_bytes or request.ram_bytes
        profile = replace(profile, ram_free_bytes=free_bytes, ram_total_bytes=total_bytes)
    return profile


def dtype_for(profile: HardwareProfile) -> torch.dtype | None:
    """Return the dtype to load weights in; None for that of the files.

    The emulated card gets float32, which every CPU computes fast.
    """
    import torch

    return torch.float32 if profile.emulated else None


def half_for(profile: HardwareProfile) -> torch.dtype:
    """Return in which dtype quantised weights are computed that were made for float16.

    A card that only imitates bfloat16 gets what they were made for. Everywhere else it is bfloat16:
    what a card misses a CPU computes, which only has slow ways for float16 (for a token and a
    four-bit matrix of 1536 x 2048 it takes 23 ms, and 0.2 ms in bfloat16).
    """
    import torch

    return torch.bfloat16 if profile.bfloat16 else torch.float16
