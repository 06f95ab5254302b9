"""The whole recipe of the shipped weights: phases, each a pure function of the one before.

The corpus grew while the model was watched, and a phase runs only with the edition it names.
To make the weights again from nothing, with one work folder W throughout:

    git checkout 40007ee; python -m assets.training.train --work W --snapshot-every 750000 \\
        --stop-at 3750000
    git checkout b750057; (the same with --stop-at 2250000)
    git checkout 161f35a; (the same with --snapshot-every 700000 --stop-at 2100000)
    git checkout 6e4e526; python -m assets.training.train --work W --snapshot-every 700000
    git checkout 9695c3a; (the same)
    git checkout main;    python -m assets.training.train --work W --snapshot-every 500000
    python -m assets.training.publish --snapshot W/latest.pt --out assets/default_model

A changed corpus does not need all that: add a phase with its digest, and train on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """One stretch of training, measured in real tokens."""

    name: str
    corpus: str
    """The edition of the corpus, see `corpus.digest`; each edition is one commit."""
    seed: int
    tokens: int
    peak_rate: float
    warmup_steps: int
    decay_from: float
    """Share of the phase after which the learning rate falls; 1.0 keeps it constant."""
    copy_share: float
    user_weight: float
    batch_tokens: int
    schedule_tokens: int = 0
    """Where the learning rate would end, if the phase is cut short before that."""


PHASES = (
    Phase(
        name="base",
        corpus="43682ea10b8513d8",
        seed=101,
        tokens=3_750_000,
        peak_rate=2.5e-3,
        warmup_steps=150,
        decay_from=1.0,
        copy_share=0.05,
        user_weight=0.08,
        batch_tokens=3072,
    ),
    Phase(
        name="broad",
        corpus="71000f7cd001e6e4",
        seed=202,
        tokens=2_250_000,
        peak_rate=2.5e-3,
        warmup_steps=1,
        decay_from=1.0,
        copy_share=0.05,
        user_weight=0.08,
        batch_tokens=3072,
    ),
    Phase(
        name="polish",
        corpus="46d10496bb63f5a9",
        seed=303,
        tokens=2_100_000,
        peak_rate=2.0e-3,
        warmup_steps=1,
        decay_from=0.0,
        schedule_tokens=7_000_000,
        copy_share=0.03,
        user_weight=0.05,
        batch_tokens=2048,
    ),
    Phase(
        name="final",
        corpus="f25c44add72429fb",
        seed=404,
        tokens=4_400_000,
        peak_rate=1.5e-3,
        warmup_steps=1,
        decay_from=0.0,
        copy_share=0.03,
        user_weight=0.05,
        batch_tokens=2048,
    ),
    Phase(
        name="last touch",
        corpus="469399499806b43c",
        seed=505,
        tokens=2_800_000,
        peak_rate=0.9e-3,
        warmup_steps=20,
        decay_from=0.0,
        copy_share=0.02,
        user_weight=0.05,
        batch_tokens=2048,
    ),
    Phase(
        name="division",
        corpus="520e99e107d33d30",
        seed=606,
        tokens=1_500_000,
        peak_rate=0.6e-3,
        warmup_steps=20,
        decay_from=0.0,
        copy_share=0.02,
        user_weight=0.05,
        batch_tokens=2048,
    ),
)
