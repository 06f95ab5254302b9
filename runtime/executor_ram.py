"""Experts in RAM as the CPU reads them: typed views, one set per place and format."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.core import ExpertId
from runtime.errors import MemoryPlanError
from runtime.formats import ExpertFormat
from runtime.kernels import views
from runtime.store import ExpertStore
from runtime.transfer import Transfer


class RamExperts:
    """The engine thread's view of a store while experts come and go.

    A place stays where it is until the tier is resized, so its views are made once. They may be
    read only while the transfer driver holds the expert for the CPU.
    """

    def __init__(self, store: ExpertStore, formats: Sequence[ExpertFormat]) -> None:
        self._store = store
        self._formats = tuple(formats)
        self._views: dict[tuple[int, ExpertFormat], dict[str, torch.Tensor]] = {}

    def views_of(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        """Return the parts of an expert that is in RAM."""
        place = self._store.tier.place_of(expert)
        assert place is not None, f"{expert} is not in RAM"
        key = (place, self._formats[expert.layer])
        known = self._views.get(key)
        if known is None:
            known = self._views[key] = views(self._store.bytes_of(expert), key[1])
        return known

    @property
    def held(self) -> int:
        """How many experts RAM may hold now."""
        return self._store.tier.table.capacity

    def resize(self, experts: int, transfer: Transfer) -> int:
        """Let RAM hold so many experts, at most as many as at the start; return how many it may.

        Called between two layers. Memory goes in blocks, and what the link still reads stays
        until the next call.
        """
        if not self._store.resizable:
            return self.held
        before = self.held
        experts = max(1, min(experts, self._store.most_experts))
        if experts > before:
            try:
                self._store.keep(experts)
            except MemoryPlanError:
                return before  # somebody else took the memory meanwhile
        in_use = transfer.resize_ram(experts)
        self._views.clear()
        self._store.keep(in_use)
        return experts
