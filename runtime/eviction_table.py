"""Eviction rules by name."""

from __future__ import annotations

from collections.abc import Callable

from runtime.errors import ConfigError
from runtime.eviction import Eviction
from runtime.eviction_frequency import DecayedFrequency
from runtime.eviction_lru import Lru
from runtime.eviction_next_use import ExpectedNextUse
from runtime.eviction_s3_fifo import S3Fifo

EVICTIONS: dict[str, Callable[[int], Eviction]] = {
    "lru": lambda layers: Lru(),
    "decayed-frequency": lambda layers: DecayedFrequency(),
    "s3-fifo": lambda layers: S3Fifo(),
    "expected-next-use": ExpectedNextUse,
}


def make_eviction(name: str, layers: int) -> Eviction:
    """Return a fresh eviction rule for a model with `layers` MoE layers.

    Raises:
        ConfigError: there is no rule of that name.
    """
    if name not in EVICTIONS:
        raise ConfigError(
            f"There is no eviction rule '{name}'.", f"Choose one of {', '.join(EVICTIONS)}."
        )
    return EVICTIONS[name](layers)
