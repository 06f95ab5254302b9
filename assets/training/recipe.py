"""The whole recipe of the shipped weights: phases, each a pure function of the one before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One stretch of training, measured in real tokens."""

    name: str
    seed: int
    tokens: int
    peak_rate: float
    warmup_steps: int
    decay_from: float
    """Share of the phase after which the learning rate falls; 1.0 keeps it constant."""
    copy_share: float
    user_weight: float
    batch_tokens: int


PHASES = (
    Phase(
        name="base",
        seed=101,
        tokens=9_000_000,
        peak_rate=2.5e-3,
        warmup_steps=150,
        decay_from=1.0,
        copy_share=0.05,
        user_weight=0.08,
        batch_tokens=3072,
    ),
)
