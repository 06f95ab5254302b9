"""A time that no policy can beat on the modelled machine: work over rates, with no order in it.

The rails of `runtime.timeline`, relaxed. From the routing of one layer to that of the next pass at
least its device experts, or its CPU experts and the host's own work, then the dense work: those
two rails run beside each other, whatever the policy. The link may move at any moment. Of all uses
at least `offline_misses` are served by a load or on the CPU; how many go where is free, and so is
what the slots hold at the start, which experts the CPU takes (the cheapest) and its rate (that of
a CPU whose memory the link leaves alone).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.core import HardwareProfile
from runtime.offline import offline_misses
from runtime.trace import ForwardPass, LayerStep

Floats = NDArray[np.float64]


def bound_s(
    passes: Sequence[ForwardPass],
    profile: HardwareProfile,
    slots: int,
    layer_bytes: Sequence[int],
) -> float:
    """Return the least seconds that `passes` take, whatever the pool of `slots` holds at first."""
    misses = offline_misses(passes, slots, free_start=True)
    least_s = 0.0
    more: list[Floats] = []
    for forward in passes:
        for step, size_bytes in zip(forward.layers, layer_bytes, strict=True):
            layer_s = _layer_s(step, forward, profile, size_bytes)
            least_s += float(layer_s[0])
            more.append(np.diff(layer_s))
    # Each layer's seconds are convex in its CPU experts, so the cheapest increments overall are
    # the best way to put any number of experts on the CPU.
    on_cpu_s = least_s + np.concatenate(([0.0], np.cumsum(np.sort(np.concatenate(more)))))
    # No constant: a copy can be called while the one before it moves.
    load_s = min(layer_bytes) / profile.link_bytes_per_s.value
    loads = np.maximum(0, misses - np.arange(len(on_cpu_s)))
    return float(np.maximum(on_cpu_s, loads * load_s).min())


def _layer_s(
    step: LayerStep, forward: ForwardPass, profile: HardwareProfile, size_bytes: int
) -> Floats:
    """Return the least seconds of a layer with 0, 1, ... all of its experts on the CPU."""
    counts = np.sort(np.fromiter(step.demands.values(), np.float64, len(step.demands)))
    device = _work_s(
        counts, size_bytes, profile.device_bytes_per_s.value, profile.device_tokens_per_pass.value
    )
    cpu = _work_s(
        counts, size_bytes, profile.cpu_expert_bytes_per_s.value, profile.cpu_tokens_per_pass.value
    )
    # The call's cost is spread over all experts of the layer: that keeps the sum convex, and low.
    cpu += profile.cpu_call_s.value / max(1, len(counts))
    on_device_s = device.sum() - np.concatenate(([0.0], np.cumsum(device[::-1])))
    host_s = profile.host_layer_s.value * forward.forwards
    on_host_s = host_s + np.concatenate(([0.0], np.cumsum(cpu)))
    more_tokens = (forward.tokens - forward.forwards) / profile.device_tokens_per_pass.value
    dense_s = profile.device_layer_s.value * (forward.forwards + more_tokens)
    layer_s: Floats = dense_s + np.maximum(on_device_s, on_host_s)
    return layer_s


def _work_s(counts: Floats, size_bytes: int, bytes_per_s: float, tokens_per_pass: float) -> Floats:
    """Return each expert's seconds on a rail, by its tokens."""
    seconds: Floats = size_bytes / bytes_per_s * (1 + (counts - 1) / tokens_per_pass)
    return seconds
