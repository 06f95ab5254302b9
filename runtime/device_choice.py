"""Where it is decided, once, which device the engine runs on."""

from __future__ import annotations

from runtime.core import HardwareProfile, MemoryPlan
from runtime.device import Device
from runtime.device_emulated import EmulatedDevice
from runtime.device_host import HostDevice


def open_device(
    profile: HardwareProfile, plan: MemoryPlan, *, virtual_clock: bool = False
) -> Device:
    """Open the device that `profile` describes, allowed to use what `plan` says.

    `virtual_clock` lets an emulated device run on modelled time alone: nothing sleeps.
    """
    if profile.device_kind == "cuda":
        from runtime.device_cuda import CudaDevice

        return CudaDevice(profile, plan.budget_bytes)
    if profile.device_kind == "emulated":
        return EmulatedDevice(profile, virtual_clock=virtual_clock)
    return HostDevice()
