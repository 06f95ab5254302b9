"""Eviction rules by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.errors import ConfigError
from runtime.eviction import Eviction
from runtime.eviction_frequency import DecayedFrequency
from runtime.eviction_lru import Lru
from runtime.eviction_next_use import ExpectedNextUse
from runtime.eviction_s3_fifo import S3Fifo

EVICTIONS: dict[str, Callable[[Sequence[int]], Eviction]] = {
    "lru": lambda experts: Lru(),
    "decayed-frequency": lambda experts: DecayedFrequency(),
    "s3-fifo": lambda experts: S3Fifo(),
    "expected-next-use": ExpectedNextUse,
}


def make_eviction(name: str, experts: Sequence[int]) -> Eviction:
    """Return a fresh eviction rule for a model with so many experts in each MoE layer.

    Raises:
        ConfigError: there is no rule of that name.
    """
    if name not in EVICTIONS:
        raise ConfigError(
            f"There is no eviction rule '{name}'.", f"Choose one of {', '.join(EVICTIONS)}."
        )
    return EVICTIONS[name](experts)
