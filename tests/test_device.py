"""The same bodies over both cards: the emulated one everywhere, the CUDA one where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from runtime.core import ExpertId
from runtime.device import Device, Stream
from runtime.device_emulated import EmulatedDevice, HappensBefore, HazardError
from runtime.link import Link
from runtime.transfer import TransferThread
from runtime.transfer_queue import Cause, Outcome, Submit
from tests.machines import emulated_profile

SLOTS, SLOT_BYTES, CHUNK_BYTES = 3, 300_032, 100_032


@pytest.fixture(
    params=[
        "emulated",
        "virtual",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    opened: Device
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from runtime.device_cuda import CudaDevice

        opened = CudaDevice(emulated_profile(25e9), 2 << 30)
    else:
        opened = EmulatedDevice(emulated_profile(1e9), virtual_clock=request.param == "virtual")
    yield opened
    opened.close()


def host_experts(device: Device, pinned: bool) -> list[torch.Tensor]:
    slab = device.allocate_host(SLOTS * 4 * SLOT_BYTES)
    if not pinned:
        slab = torch.empty_like(slab)
    slab.copy_((torch.arange(slab.numel()) * 2654435761 >> 13).to(torch.uint8))
    return list(slab.split(SLOT_BYTES))


def test_bytes_go_through_a_slot_and_back(device: Device) -> None:
    experts = host_experts(device, pinned=True)
    slots = device.allocate_slots(SLOTS, SLOT_BYTES)
    for round_number in range(4):
        for slot in range(SLOTS):
            device.wait(Stream.COPY, device.record(Stream.COMPUTE))
            source = experts[round_number * SLOTS + slot]
            _, fence = device.copy(slot, slots[slot], source, device.now_s(), True)
            device.wait(Stream.COMPUTE, fence)
            seen: list[torch.Tensor] = []

            def read(slot: int = slot, seen: list[torch.Tensor] = seen) -> None:
                seen.append(slots[slot].clone())

            with device.computing():
                device.launch(slot, SLOT_BYTES, 1, read)
            device.wait_for_compute()
            assert torch.equal(seen[0].cpu(), source)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_transfer_thread_fills_slots_while_compute_reads_them(
    device: Device, pinned: bool, request: pytest.FixtureRequest
) -> None:
    if "virtual" in request.node.name:
        pytest.skip("the thread runs in real time")
    experts = host_experts(device, pinned)
    slots = device.allocate_slots(SLOTS, SLOT_BYTES)
    link = Link(device, slots, lambda expert: experts[expert.expert], CHUNK_BYTES)
    transfer = TransferThread(device, link, CHUNK_BYTES)
    seen: dict[int, torch.Tensor] = {}
    try:
        for first in range(0, SLOTS * 4, SLOTS):
            for slot in range(SLOTS):
                link.free(slot)
                order = Submit(ExpertId(0, first + slot), slot, SLOT_BYTES, Cause.DEMAND)
                transfer.order([order], device.now_s())
            landed = 0
            while landed < SLOTS:
                for event in transfer.ended(device.now_s(), wait=True):
                    assert event.outcome is Outcome.LANDED
                    link.take_done(event.slot)
                    landed += 1
                    device.reached(event.at_s)

                    def read(event: object = event) -> None:
                        seen[event.expert.expert] = slots[event.slot].clone()  # type: ignore[attr-defined]

                    with device.computing():
                        device.launch(event.slot, SLOT_BYTES, 1, read)
        device.wait_for_compute()
    finally:
        transfer.close()
    for number, expert in enumerate(experts):
        assert torch.equal(seen[number].cpu(), expert), f"expert {number}"


def test_time_goes_forward_and_fences_are_reached_in_order(device: Device) -> None:
    experts = host_experts(device, pinned=True)
    slots = device.allocate_slots(SLOTS, SLOT_BYTES)
    began_s = device.now_s()
    reached = []
    for slot in range(SLOTS):
        _, fence = device.copy(slot, slots[slot], experts[slot], began_s, True)
        reached.append(device.synchronize(fence))
    assert reached == sorted(reached)
    assert reached[0] >= began_s


def test_reading_without_a_fence_is_caught() -> None:
    device = EmulatedDevice(emulated_profile(), virtual_clock=True)
    slots = device.allocate_slots(1, 64)
    device.copy(0, slots[0], torch.ones(64, dtype=torch.uint8), 0.0, True)
    with pytest.raises(HazardError, match="compute reads slot 0"):
        device.launch(0, 64, 1, lambda: None)


def test_overwriting_without_a_fence_is_caught() -> None:
    device = EmulatedDevice(emulated_profile(), virtual_clock=True)
    slots = device.allocate_slots(1, 64)
    bytes_ = torch.ones(64, dtype=torch.uint8)
    _, fence = device.copy(0, slots[0], bytes_, 0.0, True)
    device.wait(Stream.COMPUTE, fence)
    device.launch(0, 64, 1, lambda: None)
    with pytest.raises(HazardError, match="copy writes slot 0 while compute reads it"):
        device.copy(0, slots[0], bytes_, 0.0, True)


def test_the_ledger_charges_link_device_and_cpu() -> None:
    profile = emulated_profile(link_bytes_per_s=1e6, cpu_bytes_per_s=2e6)
    device = EmulatedDevice(profile, virtual_clock=True)
    slots = device.allocate_slots(1, 64_000)
    began_s, fence = device.copy(0, slots[0], slots[0].clone(), 0.0, True)
    lands_s = device.synchronize(fence)
    assert began_s == pytest.approx(0.0002), "the call takes a while, but not on the link"
    assert lands_s - began_s == pytest.approx(0.064)
    # While the link copies the CPU has three quarters of its rate; afterwards all of it.
    seconds = device.on_cpu([(1_000_000, 1)], 0, lambda: None)
    shared_s = lands_s - 0.0002
    assert seconds == pytest.approx(0.0002 + shared_s + (1e6 - shared_s * 1.5e6) / 2e6)
    before_s = device.now_s()
    device.begin_layer(1)
    assert device.now_s() - before_s == pytest.approx(0.0002 + 0.001)
    device.wait(Stream.COMPUTE, fence)
    device.launch(0, 1_500_000, 1, lambda: None)
    assert device.busy_until_s() - device.now_s() == pytest.approx(0.001)


def test_rows_cross_to_the_cpu_and_come_back(device: Device) -> None:
    with torch.inference_mode(), device.computing():
        hidden = torch.arange(96.0, device=device.torch_device).view(2, 48)
        chosen = torch.tensor([[3, 1], [2, 0]], device=device.torch_device)
        for layer in range(1, 4):
            on_cpu, index = device.to_host([hidden * layer, chosen])
            assert index.tolist() == [[3, 1], [2, 0]]
            (beside,) = device.to_host_beside([hidden])
            rows = [on_cpu + 1, beside[1:] + 2]
            back = device.to_device(rows)
            assert [mine.device.type for mine in back] == [device.torch_device.type] * 2
            assert torch.equal(back[0], hidden * layer + 1)
            assert torch.equal(back[1], hidden[1:] + 2)


def test_returning_rows_before_the_last_ones_were_taken_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = EmulatedDevice(emulated_profile(), virtual_clock=True)
    rows = [torch.ones(1, 4)]
    for _ in range(2):
        device.to_host([])
        device.to_device(rows)
        device.to_device(rows)
    monkeypatch.setattr(HappensBefore, "learn", lambda *told: None)
    device.to_host([])
    with pytest.raises(HazardError, match="engine writes returning rows 0 while compute reads it"):
        device.to_device(rows)
