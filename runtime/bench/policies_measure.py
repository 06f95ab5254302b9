"""One cell of `bench policies`: every policy on the same chats and machine, under virtual time.

Every policy starts with full slots and sees the same passes, of which the first are not measured
(`policies_chats`).
Only a model's first layers are simulated; seconds and bytes are scaled by layers / simulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runtime.activation_tracing import MoeInfinityTracer
from runtime.bench.policies_bound import bound_s
from runtime.bench.policies_cells import Cell
from runtime.bench.policies_chats import collected, preloaded, session_of
from runtime.bench.policies_models import MODELS
from runtime.core import HardwareProfile
from runtime.errors import PreScopeError
from runtime.link import chunk_bytes_for
from runtime.policy import Policy, PolicySetup
from runtime.policy_table import BY_LAYER, make_oracle, make_policy
from runtime.residency import Residency
from runtime.scheduler import Costs
from runtime.simulate import Simulated, simulate
from runtime.simulate_deciding import Deciding

Settings = Mapping[str, Any]

MOE_INFINITY, ORACLE = "moe-infinity", "oracle"

RIVALS: Mapping[str, Sequence[Settings]] = {
    "layer-stream": ({},),
    "on-demand": ({"eviction": "lru"}, {"eviction": "decayed-frequency"}),
    "cpu-miss": ({},),
    "static-split": ({},),
    "hybrid": tuple(
        {"split": split, "eviction": eviction}
        for split in ("makespan", "share")
        for eviction in ("lru", "decayed-frequency")
    ),
    MOE_INFINITY: ({},),
}
"""The rivals and what is tried of each; the best in a cell is the rival's result there."""

PRESCOPE: Mapping[str, Sequence[Settings]] = {"prescope": ({},)}


PLANNING_FILE = Path(__file__).resolve().parents[2] / "assets" / "bench" / "planning.json"


@cache
def planning_costs() -> Mapping[str, Deciding]:
    """Read what deciding takes, by policy, on the machine that the committed file names."""
    policies = json.loads(PLANNING_FILE.read_text("utf-8"))["planning"]["policies"]
    return {name: Deciding.from_json(value) for name, value in policies.items()}


class BoundError(PreScopeError):
    """A policy was faster than is possible: the simulator is wrong."""


@dataclass(frozen=True)
class Result:
    """One policy in one cell, for the whole model. Per token of output, or of prompt in prefill.

    `stall_s` is per pass. `bytes_by_cause` is what the link moved on demand and ahead, the latter
    used, late, wasted or cancelled, and the weights that the CPU read.
    """

    policy: str
    settings: Settings
    tokens_per_s: float
    pass_s: float
    stall_s: float
    hit_rate: float
    bytes_by_cause: Mapping[str, float]
    link_busy_share: float
    cpu_busy_share: float
    ratio_to_bound: float


@dataclass(frozen=True)
class CellResults:
    """A cell's results by policy, and the tokens/s that nothing may exceed."""

    cell: Cell
    bound_tokens_per_s: float
    results: Mapping[str, Result]


def run_cell(cell: Cell, seed: int = 0, charge_planning: bool = False) -> CellResults:
    """Run every policy in a cell, with each of its settings; keep each policy's best.

    `seed` draws the chats. A machine's `host_layer_s` stands for all that the host does; with
    `charge_planning` what deciding takes each policy in Python comes on top of it.

    Raises:
        BoundError: a policy was faster than the bound.
    """
    bench = _Bench(cell, seed, charge_planning)
    results = {
        name: max((bench.run(name, s) for s in choices), key=lambda result: result.tokens_per_s)
        for name, choices in {**RIVALS, **PRESCOPE}.items()
    }
    results[ORACLE] = bench.run(ORACLE, {})
    return CellResults(cell, bench.bound_tokens_per_s, results)


def run_variants(
    cell: Cell, policy: str, variants: Mapping[str, Settings], seed: int = 0
) -> dict[str, Result]:
    """Run one policy in a cell with several settings; return the results by the settings' names.

    Raises:
        BoundError: one was faster than the bound.
    """
    bench = _Bench(cell, seed)
    return {name: bench.run(policy, settings) for name, settings in variants.items()}


def watch_policy(
    cell: Cell, policy: str, watch: Callable[[Residency], None], seed: int = 0
) -> Result:
    """Run one policy in a cell after `watch` was given its residency, to see its calls."""
    return _Bench(cell, seed).run(policy, {}, watch)


class _Bench:
    """One cell's machine, model and chats, on which policies are run one after another."""

    def __init__(self, cell: Cell, seed: int, charge_planning: bool = False) -> None:
        model, session = MODELS[cell.model], session_of(cell, seed)
        self._cell = cell
        self._deciding = planning_costs() if charge_planning else {}
        layers = len(session.experts)
        self._session = session
        self._profile: HardwareProfile = cell.machine.profile(
            model.layer_dense_bytes, model.weight_bits
        )
        self._scale = model.layers / layers
        self._setup = PolicySetup(
            session.experts,
            session.top_k,
            (model.expert_bytes,) * layers,
            max(session.top_k, round(cell.residency * sum(session.experts))),
            Costs.of(self._profile),
        )
        self._collected = collected(model.routing, cell.batch, seed)
        self._preload = {
            by_layer: preloaded(model.routing, cell.batch, self._setup.slots, by_layer, seed)
            for by_layer in (False, True)
        }
        self._predictor_bytes = model.lookahead_bytes
        self._tokens = sum(forward.tokens for forward in session.measured)
        least_s = bound_s(
            session.measured, self._profile, self._setup.slots, self._setup.layer_bytes
        )
        self.bound_tokens_per_s = self._tokens / (least_s * self._scale)

    def run(
        self,
        name: str,
        settings: Settings,
        watch: Callable[[Residency], None] = lambda residency: None,
    ) -> Result:
        """Run one policy with one choice of its settings."""
        policy = self._policy(name, settings)
        chunk_bytes = chunk_bytes_for(self._profile.link_bytes_per_s.value)
        if not policy.copies_ahead:
            # Chunks let demands overtake prefetches; without prefetches an expert may stay whole.
            chunk_bytes = max(chunk_bytes, *self._setup.layer_bytes)
        simulated = simulate(
            self._session.passes,
            self._profile,
            policy,
            self._setup.slots,
            self._setup.layer_bytes,
            chunk_bytes,
            predictor_bytes=self._predictor_bytes,
            warm_passes=self._session.warm,
            preload=self._preload[name in BY_LAYER],
            deciding=self._deciding.get(name),
            watch=watch,
        )
        return self._result(name, settings, simulated)

    def _policy(self, name: str, settings: Settings) -> Policy:
        if name == ORACLE:
            return make_oracle(self._session.passes, self._setup)
        if name == MOE_INFINITY:
            settings = {**settings, "tracer": self._tracer()}
        return make_policy(name, self._setup, **settings)

    def _tracer(self) -> MoeInfinityTracer:
        """Return MoE-Infinity's memory after other chats; each run adds to a copy of its own."""
        layers, experts = len(self._session.experts), max(self._session.experts)
        return MoeInfinityTracer(layers, experts, collection=deepcopy(self._collected))

    def _result(self, name: str, settings: Settings, simulated: Simulated) -> Result:
        counted = simulated.measured
        total_s = simulated.measured_s
        passes = len(self._session.measured)
        tokens_per_s = self._tokens / (total_s * self._scale)
        ratio = tokens_per_s / self.bound_tokens_per_s
        if ratio > 1.0 + 1e-9:
            raise BoundError(
                f"{name} {dict(settings)} reached {tokens_per_s:.6g} tokens/s, {ratio:.6f} of "
                f"what the bound allows ({self.bound_tokens_per_s:.6g}), in {self._cell.name}.",
                "The simulator or the bound is wrong: nothing it says counts until that is found.",
            )
        causes = {
            "on_demand": counted.link_bytes_on_demand,
            "prefetch_used": counted.link_bytes_prefetch_used,
            "prefetch_late": counted.link_bytes_prefetch_late,
            "prefetch_wasted": counted.link_bytes_prefetch_wasted,
            "cancelled": counted.link_bytes_cancelled,
            "cpu": counted.served_cpu * self._setup.layer_bytes[0],
        }
        return Result(
            name,
            settings,
            tokens_per_s,
            total_s * self._scale / passes,
            counted.stall_s * self._scale / passes,
            counted.hit_rate,
            {cause: size * self._scale / self._tokens for cause, size in causes.items()},
            counted.link_busy_s / total_s,
            counted.cpu_expert_s / total_s,
            ratio,
        )
