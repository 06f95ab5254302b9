"""The layer that residency is serving, and what it asks its driver to do next. Pure records."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.core import ExpertId
from runtime.policy import Moment, Routed
from runtime.scheduler import MissPlan
from runtime.trace import Prediction
from runtime.transfer_queue import Order


class Steps(NamedTuple):
    """What a driver does next: first the orders, so that the link starts, then the computing."""

    orders: tuple[Order, ...] = ()
    compute: tuple[tuple[ExpertId, int], ...] = ()
    cpu: tuple[ExpertId, ...] = ()


@dataclass
class OpenLayer:
    """The layer being served: what was decided about it, and who still waits for a slot, for its
    bytes, or to be computed.

    `along` came with the layer although nobody asked for it; it is waited for, not computed.
    """

    layer: int
    routed: Routed
    plan: MissPlan
    predictions: Sequence[Prediction]
    moment: Moment
    for_slot: deque[ExpertId] = field(default_factory=deque)
    for_bytes: set[ExpertId] = field(default_factory=set)
    to_compute: set[ExpertId] = field(default_factory=set)
    along: set[ExpertId] = field(default_factory=set)
    late: set[ExpertId] = field(default_factory=set)
    attempts: dict[ExpertId, int] = field(default_factory=dict)
    held: bool = False
