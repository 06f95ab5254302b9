"""Machines for tests: profiles with round numbers."""

from __future__ import annotations

from runtime.core import HardwareProfile, Reading


def emulated_profile(
    link_bytes_per_s: float = 60e6,
    cpu_bytes_per_s: float = 100e6,
    host_layer_s: float = 0.0002,
) -> HardwareProfile:
    """An emulated card beside a CPU that computes experts faster than the link brings them."""

    def emulated(value: float) -> Reading:
        return Reading(value, "emulated")

    return HardwareProfile(
        device_kind="emulated",
        device_name="emulated card",
        vram_total_bytes=1 << 30,
        vram_free_bytes=1 << 30,
        ram_total_bytes=8 << 30,
        ram_free_bytes=4 << 30,
        link_bytes_per_s=emulated(link_bytes_per_s),
        link_unpinned_bytes_per_s=emulated(link_bytes_per_s / 2),
        link_call_s=emulated(0.0002),
        cpu_expert_bytes_per_s=emulated(cpu_bytes_per_s),
        cpu_expert_bytes_per_s_while_copying=emulated(cpu_bytes_per_s * 0.75),
        cpu_call_s=emulated(0.0002),
        device_bytes_per_s=emulated(1.5e9),
        device_layer_s=emulated(0.001),
        host_layer_s=emulated(host_layer_s),
    )
