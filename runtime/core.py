"""The nouns that every room speaks: small frozen records without behaviour of their own.

Units are in the names: `_bytes`, `_s` (seconds), `_per_s`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Source = Literal["measured", "emulated", "assumed"]
DeviceKind = Literal["cuda", "emulated", "cpu"]
PolicyName = Literal[
    "prescope",
    "hybrid",
    "moe-infinity",
    "on-demand",
    "cpu-miss",
    "static-split",
    "layer-stream",
    "cpu-only",
    "oracle",
]
POLICIES: tuple[PolicyName, ...] = (
    "prescope",
    "hybrid",
    "moe-infinity",
    "on-demand",
    "cpu-miss",
    "static-split",
    "layer-stream",
    "cpu-only",
)


class ExpertId(NamedTuple):
    """One expert: `layer` counts MoE layers from 0, not decoder layers."""

    layer: int
    expert: int


@dataclass(frozen=True)
class Reading:
    """A figure together with where it comes from, so that it is never sold as more."""

    value: float
    source: Source


@dataclass(frozen=True)
class HardwareProfile:
    """What one machine can do, probed once at start.

    `link_*` is host to device. `cpu_expert_bytes_per_s` is the rate at which expert weights are
    consumed by computing experts on the CPU, alone and while the link copies. `cpu_call_s` and
    `link_call_s` are the fixed costs of one hand-off. `device_bytes_per_s` is the rate at which
    the device consumes expert weights; `device_layer_s` is a layer's dense work for one token.
    `host_layer_s` is host time per MoE layer. `*_tokens_per_pass` is how many more tokens for one
    expert cost as much as reading its weights once more: below it work is bound by memory.
    `disk_*` is what reading whole experts from the model's files costs, past the page cache.
    `bfloat16` is whether the device computes that itself; cards before Ampere only imitate it.
    `pinnable_bytes` is how much host memory the system lets be pinned, None where no limit is
    known.
    """

    device_kind: DeviceKind
    device_name: str
    vram_total_bytes: int
    vram_free_bytes: int
    ram_total_bytes: int
    ram_free_bytes: int
    link_bytes_per_s: Reading
    link_unpinned_bytes_per_s: Reading
    link_call_s: Reading
    cpu_expert_bytes_per_s: Reading
    cpu_expert_bytes_per_s_while_copying: Reading
    cpu_call_s: Reading
    device_bytes_per_s: Reading
    device_layer_s: Reading
    host_layer_s: Reading
    cpu_tokens_per_pass: Reading = Reading(16.0, "assumed")
    device_tokens_per_pass: Reading = Reading(256.0, "assumed")
    disk_bytes_per_s: Reading = Reading(2e9, "assumed")
    disk_call_s: Reading = Reading(1e-4, "assumed")
    pinnable_bytes: int | None = None
    bfloat16: bool = True

    @property
    def emulated(self) -> bool:
        return self.device_kind == "emulated"


@dataclass(frozen=True)
class Transients:
    """What a forward pass needs for a moment beside weights and KV, in bytes.

    `token_bytes` per token of the chunk, `context_bytes` per token it attends to, `pair_bytes` per
    pair of the two (attention scores, where no fused attention keeps them in registers), and
    `base_bytes` whatever their number.
    """

    token_bytes: int = 0
    context_bytes: int = 0
    pair_bytes: int = 0
    base_bytes: int = 0

    def size_bytes(self, tokens: int, context_tokens: int) -> int:
        """Return what `tokens` tokens need that attend to `context_tokens`, themselves included."""
        pairs_bytes = tokens * context_tokens * self.pair_bytes
        alone_bytes = tokens * self.token_bytes + context_tokens * self.context_bytes
        return self.base_bytes + alone_bytes + pairs_bytes


@dataclass(frozen=True)
class ModelShape:
    """The sizes a memory plan needs. `experts` has one entry per MoE layer.

    `predictor_bytes` are the matrices on the device that guess the experts of later layers.
    `reading_bytes` are what all readers of experts together need beside the experts' places.
    """

    name: str
    experts: tuple[int, ...]
    top_k: int
    expert_bytes: int
    dense_bytes: int
    kv_bytes_per_token: int
    context_tokens: int
    transients: Transients = Transients()
    predictor_bytes: int = 0
    reading_bytes: int = 0

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def expert_count(self) -> int:
        return sum(self.experts)


@dataclass(frozen=True)
class MemoryPlan:
    """Where every byte goes. The parts never exceed `budget_bytes`, nor RAM's `ram_budget_bytes`.

    `kv_tokens` are shared by all sequences; one of them may have `context_tokens` (0: all of
    them). `prefill_bytes` is the part of the workspace that the chunks of a prompt may use.
    `ram_device_bytes` are the device's parts where the device is this computer itself, and
    `ram_reading_bytes` what those need who read experts. `notes` are sentences for a person.

    `ram_experts` is how many experts RAM holds at once; the others are read from the disk when
    they are needed. None stands for all of them.
    """

    budget_bytes: int
    dense_bytes: int
    kv_tokens: int
    kv_bytes: int
    workspace_bytes: int
    reserve_bytes: int
    slots: int
    slot_bytes: int
    ram_experts: int | None = None
    predictor_bytes: int = 0
    context_tokens: int = 0
    prefill_bytes: int = 0
    ram_budget_bytes: int = 0
    ram_device_bytes: int = 0
    ram_reserve_bytes: int = 0
    ram_experts_bytes: int = 0
    ram_reading_bytes: int = 0
    pinned_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def slots_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def used_bytes(self) -> int:
        return (
            self.dense_bytes
            + self.predictor_bytes
            + self.kv_bytes
            + self.workspace_bytes
            + self.reserve_bytes
            + self.slots_bytes
        )


@dataclass(frozen=True)
class Message:
    """One turn of a chat as the template sees it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy; `seed` None draws a fresh one."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


FinishReason = Literal["stop", "length", "cancelled", "error"]
DeltaKind = Literal["reasoning", "answer"]


@dataclass(frozen=True)
class GenerationStats:
    """One generation in figures; the same record in `chat --json`, the panel and the API.

    The five `served_*` add up to `routed`, which counts (layer, expert) uses per forward pass.
    `disk_stall_s` is the part of `stall_s` spent on experts that RAM did not hold, `ram_hit_rate`
    the share of experts looked for in RAM that were there (None: all are there) and
    `ram_experts` how many RAM may hold (None: unknown).
    """

    emulated: bool
    device: str
    policy: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    hit_rate: float = 0.0
    routed: int = 0
    served_resident: int = 0
    served_prefetch_in_time: int = 0
    served_prefetch_late: int = 0
    served_on_demand: int = 0
    served_cpu: int = 0
    link_bytes_on_demand: int = 0
    link_bytes_prefetch_used: int = 0
    link_bytes_prefetch_wasted: int = 0
    link_bytes_per_s: float = 0.0
    stall_s: float = 0.0
    predictor_s: float = 0.0
    predictor_recall: float | None = None
    predictor_precision: float | None = None
    vram_used_bytes: int = 0
    ram_used_bytes: int = 0
    cache_slots: int = 0
    cache_slots_used: int = 0
    disk_bytes: int = 0
    disk_stall_s: float = 0.0
    ram_hit_rate: float | None = None
    ram_experts: int | None = None


@dataclass(frozen=True)
class Accepted:
    """The request is valid and its prompt is counted; no token has been computed yet."""

    prompt_tokens: int
    reused_tokens: int = 0


@dataclass(frozen=True)
class Delta:
    """Text that just became final, with the token ids that carried it."""

    kind: DeltaKind
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The generation ended; always the last chunk, exactly once."""

    reason: FinishReason
    stats: GenerationStats


GenerationChunk = Accepted | Delta | Finished

EngineState = Literal["starting", "empty", "loading", "ready", "restarting", "dead"]


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is. `text` is a short sentence for a person."""

    text: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True)
class EngineStatus:
    """What the app shows about the engine at any moment.

    `model` is the model that answers now (a failed switch leaves the previous one). `notice` is
    the last thing a person should know: why a load failed, why the engine was restarted.
    `remarks` are sentences about how the model that answers was loaded.
    """

    state: EngineState
    model: str | None = None
    loading: str | None = None
    progress: LoadProgress = LoadProgress()
    notice: str = ""
    next_step: str = ""
    restarts: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class TelemetrySnapshot:
    """The live panel's picture of the engine, pushed about four times a second.

    `served` counts expert uses of the last second or so by where they came from, in the order of
    `SERVED`. `heat` is one byte per (layer, expert), row after row, base64: bit 7 is set while the
    expert is in a slot, the low seven bits say how recently and often it was used (0 to 127).
    `stall_s_per_token` and the two speeds are over the last generation or the running one.

    `prediction` says whether experts are copied ahead now. `prefetch_bytes_per_token` is what that
    moved per token of the generation: in time, late, wasted. `predictor_recall` is the share of
    misses that had been predicted, `predictor_precision` the share of prefetches that were used.
    `verdict` is one sentence of the controller that measures whether prefetching pays here, and
    `trial_tokens_per_s` its pair of speeds, without and with. `stall_s_by_layer` is per token.
    `disk_*` and `ram_*` are as in `GenerationStats`.
    """

    sequence: int
    emulated: bool
    device: str
    model: str
    policy: str
    generating: bool
    tokens_per_s: float
    ttft_s: float
    served: tuple[int, int, int, int, int]
    hit_rate: float
    link_bytes_per_s: float
    link_max_bytes_per_s: float
    link_bytes_total: int
    stall_s_per_token: float
    token_s: float
    cpu_s_per_token: float
    vram_used_bytes: int
    vram_budget_bytes: int
    ram_used_bytes: int
    ram_total_bytes: int
    cache_slots: int
    cache_slots_used: int
    layers: int
    experts: int
    heat: str
    prediction: bool = False
    prefetch_bytes_per_token: tuple[float, float, float] = (0.0, 0.0, 0.0)
    predictor_recall: float | None = None
    predictor_precision: float | None = None
    predictor_s_per_token: float = 0.0
    verdict: str = ""
    trial_tokens_per_s: tuple[float, float] | None = None
    stall_s_by_layer: tuple[float, ...] = ()
    disk_bytes_per_s: float = 0.0
    disk_bytes_total: int = 0
    disk_stall_s_per_token: float = 0.0
    ram_hit_rate: float | None = None
    ram_experts: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether copying ahead pays on this machine, as live trials found it.

    `look_ahead` is for how many layers experts are copied ahead. The speeds, in tokens/s without
    and with, are 0 before the first trial.
    """

    look_ahead: int = 2
    without_tokens_per_s: float = 0.0
    with_tokens_per_s: float = 0.0

    @property
    def pair(self) -> tuple[float, float] | None:
        """Speeds without and with, or None before the first trial."""
        if not self.without_tokens_per_s:
            return None
        return self.without_tokens_per_s, self.with_tokens_per_s

    @property
    def text(self) -> str:
        """One sentence for a person."""
        if not self.without_tokens_per_s:
            return "Not measured yet whether copying ahead pays here."
        gain = f"{100 * (self.with_tokens_per_s / self.without_tokens_per_s - 1):+.0f} %"
        if self.look_ahead == 0:
            return f"Copying ahead does not pay here ({gain}): switched off."
        if self.look_ahead == 1:
            return f"No clear difference ({gain}): only the next layer is copied ahead."
        return f"Copying ahead pays here: {gain}."


SERVED = ("resident", "prefetch in time", "prefetch late", "on demand", "CPU")


@dataclass(frozen=True)
class EmulatedMachine:
    """The numbers of the emulated card; a person can change them in the settings.

    A desktop with an RTX 4090 on PCIe 4.0 (25 GB/s over the link, 55 GB/s for experts on the CPU,
    5 GB/s from its disk) about eight times slower, for experts about 64 times smaller than those of
    a 30B model: the ratios are kept, and modelled time dominates this machine's own.
    """

    link_bytes_per_s: float = 50e6
    link_call_s: float = 0.0004
    cpu_expert_bytes_per_s: float = 110e6
    cpu_expert_bytes_per_s_while_copying: float = 82e6
    cpu_call_s: float = 0.00016
    device_bytes_per_s: float = 1.7e9
    device_layer_s: float = 0.0006
    host_layer_s: float = 0.0008
    vram_bytes: int = 0
    disk_bytes_per_s: float = 10e6
    disk_call_s: float = 0.0004


ExpertsWish = Literal["as stored", "int8", "int4"]
EXPERTS_WISHES: tuple[ExpertsWish, ...] = ("as stored", "int8", "int4")


@dataclass(frozen=True)
class LoadRequest:
    """Which model to load and how. `path` is a folder; `default` is the shipped model.

    `cache_fraction` is the share of all experts that fit in slots; `vram_bytes` caps the device
    budget instead; both None lets the planner decide. `eviction` replaces the rule of a policy
    that lets one choose; `prediction` says whether experts are copied ahead at first. `experts`
    asks for experts of 16 or 32 bits to be quantised while they are loaded. `ram_bytes` caps what
    the engine may use of RAM; experts that find no place in it stay on the disk.
    """

    model: str = "default"
    policy: PolicyName | None = None
    cache_fraction: float | None = None
    vram_bytes: int | None = None
    link_bytes_per_s: float | None = None
    emulated: EmulatedMachine = field(default_factory=EmulatedMachine)
    eviction: str | None = None
    prediction: bool = True
    experts: ExpertsWish = "as stored"
    ram_bytes: int | None = None
