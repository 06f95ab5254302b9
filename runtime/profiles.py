"""Profiles of machines that were not measured: the emulated card and the plain CPU. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.core import EmulatedMachine, HardwareProfile, Reading


@dataclass(frozen=True)
class Memory:
    """What there is and what is free, in bytes; both 0 when unknown."""

    total_bytes: int
    free_bytes: int


def _assumed(value: float) -> Reading:
    return Reading(value, "assumed")


# What stands in for anything that could not be measured: cautious figures for PCIe 4 and DDR4.
LINK_BYTES_PER_S = _assumed(12e9)
LINK_UNPINNED_BYTES_PER_S = _assumed(5e9)
LINK_CALL_S = _assumed(20e-6)
CPU_EXPERT_BYTES_PER_S = _assumed(15e9)
CPU_EXPERT_BYTES_PER_S_WHILE_COPYING = _assumed(10e9)
CPU_CALL_S = _assumed(50e-6)
DEVICE_BYTES_PER_S = _assumed(250e9)
DEVICE_LAYER_S = _assumed(50e-6)
HOST_LAYER_S = _assumed(100e-6)


def emulated_profile(machine: EmulatedMachine, ram: Memory) -> HardwareProfile:
    """Return the profile of the emulated card; VRAM 0 lets the planner derive a size."""

    def reading(value: float) -> Reading:
        return Reading(value, "emulated")

    return HardwareProfile(
        device_kind="emulated",
        device_name="Emulated card",
        vram_total_bytes=machine.vram_bytes,
        vram_free_bytes=machine.vram_bytes,
        ram_total_bytes=ram.total_bytes,
        ram_free_bytes=ram.free_bytes,
        link_bytes_per_s=reading(machine.link_bytes_per_s),
        link_unpinned_bytes_per_s=reading(machine.link_bytes_per_s),
        link_call_s=reading(machine.link_call_s),
        cpu_expert_bytes_per_s=reading(machine.cpu_expert_bytes_per_s),
        cpu_expert_bytes_per_s_while_copying=reading(machine.cpu_expert_bytes_per_s_while_copying),
        cpu_call_s=reading(machine.cpu_call_s),
        device_bytes_per_s=reading(machine.device_bytes_per_s),
        device_layer_s=reading(machine.device_layer_s),
        host_layer_s=reading(machine.host_layer_s),
        disk_bytes_per_s=reading(machine.disk_bytes_per_s),
        disk_call_s=reading(machine.disk_call_s),
    )


def cpu_profile(name: str, ram: Memory) -> HardwareProfile:
    """Return the profile of a machine that computes experts in place; it has no link to measure."""
    return HardwareProfile(
        device_kind="cpu",
        device_name=name,
        vram_total_bytes=0,
        vram_free_bytes=0,
        ram_total_bytes=ram.total_bytes,
        ram_free_bytes=ram.free_bytes,
        link_bytes_per_s=LINK_BYTES_PER_S,
        link_unpinned_bytes_per_s=LINK_UNPINNED_BYTES_PER_S,
        link_call_s=LINK_CALL_S,
        cpu_expert_bytes_per_s=CPU_EXPERT_BYTES_PER_S,
        cpu_expert_bytes_per_s_while_copying=CPU_EXPERT_BYTES_PER_S_WHILE_COPYING,
        cpu_call_s=CPU_CALL_S,
        device_bytes_per_s=DEVICE_BYTES_PER_S,
        device_layer_s=DEVICE_LAYER_S,
        host_layer_s=HOST_LAYER_S,
    )
