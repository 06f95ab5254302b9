"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from runtime.core import POLICIES
from runtime.errors import ConfigError
from runtime.policy import Policy, PolicySetup
from runtime.policy_moe_infinity import MoeInfinity
from runtime.policy_oracle import Oracle
from runtime.policy_prescope import PreScope
from runtime.policy_reactive import CpuMiss, CpuOnly, Hybrid, LayerStream, OnDemand, StaticSplit
from runtime.trace import ForwardPass

_POLICIES: dict[str, Callable[..., Policy]] = {
    "prescope": PreScope,
    "hybrid": Hybrid,
    "moe-infinity": MoeInfinity,
    "on-demand": OnDemand,
    "cpu-miss": CpuMiss,
    "static-split": StaticSplit,
    "layer-stream": LayerStream,
    "cpu-only": CpuOnly,
}


FREE_EVICTION = ("prescope", "hybrid", "on-demand")
"""Policies that work with any eviction rule, given as `eviction`; the others have their own."""

BY_LAYER = ("layer-stream", "static-split")
"""Policies that place whole layers."""


def make_policy(name: str, setup: PolicySetup, **settings: Any) -> Policy:
    """Return a fresh policy; `settings` are its own keyword arguments.

    Raises:
        ConfigError: there is no policy of that name, or it needs slots and there are none.
    """
    if name not in _POLICIES:
        raise ConfigError(
            f"There is no policy called {name!r}.", f"Choose one of {', '.join(POLICIES)}."
        )
    if setup.slots == 0 and name != "cpu-only":
        raise ConfigError(
            f"The policy {name!r} needs expert slots and this machine has none.",
            "Without a card experts are computed in place: choose cpu-only.",
        )
    return _POLICIES[name](setup, **settings)


def make_oracle(passes: Sequence[ForwardPass], setup: PolicySetup) -> Policy:
    """Return the policy that knows the trace it is used for."""
    return Oracle(passes, setup)
