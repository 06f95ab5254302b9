"""The expert slots' memory: a few blocks on the device, so that the last ones can be given back."""

from __future__ import annotations

import torch

from runtime.device import Device

BLOCKS = 16
LEAST_BLOCK_BYTES = 32 * 2**20
"""Smaller blocks would share memory with other tensors and give nothing back."""


class SlotBlocks:
    """Slots of `slot_bytes` by number, indexed like one (slots, slot_bytes) uint8 tensor.

    The engine thread alone gives back; what is given back nobody uses any more.

    Raises:
        MemoryPlanError: the device has not got that much.
    """

    def __init__(self, device: Device, slots: int, slot_bytes: int) -> None:
        least = -(-LEAST_BLOCK_BYTES // max(1, slot_bytes))
        self._per_block = max(1, least, -(-slots // BLOCKS))
        self._blocks: list[torch.Tensor] = []
        for first in range(0, slots, self._per_block):
            count = min(self._per_block, slots - first)
            self._blocks.append(device.allocate_slots(count, slot_bytes))

    @property
    def slots(self) -> int:
        """How many slots have memory."""
        return sum(len(block) for block in self._blocks)

    def __getitem__(self, key: tuple[int, slice]) -> torch.Tensor:
        slot, part = key
        block, row = divmod(slot, self._per_block)
        return self._blocks[block][row, part]

    def keep(self, slots: int) -> int:
        """Give back the blocks behind the first `slots` slots; return how many have memory."""
        del self._blocks[-(-slots // self._per_block) :]
        return self.slots
