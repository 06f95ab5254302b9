"""Which experts a model's chats use most, kept from one start to the next: the first to get slots.

Uses are counted per token that decodes (a prompt counts as one), and halve with every start, so
that what a person talks about now outweighs what they did last month. A file that cannot be used
is ignored with a notice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.core import ExpertId
from runtime.trace import Experts

VERSION = 1
SAVE_EVERY_USES = 20_000
MAX_FILE_BYTES = 64 * 2**20
_MOST_USES = 1e15


class HotExperts:
    """Counts uses of one model's experts. The engine thread owns it.

    `experts` has one entry per MoE layer; `file` None keeps nothing.
    """

    def __init__(self, experts: Sequence[int], file: Path | None) -> None:
        self._experts = tuple(experts)
        self._file = file
        self._uses = np.zeros((len(self._experts), max(self._experts)))
        self._unsaved = 0
        self.notices: tuple[str, ...] = ()
        if file is not None and file.exists():
            self._take_up(file)

    def use(self, layer: int, experts: Experts | Sequence[int]) -> None:
        """Note that a pass used these experts of a layer."""
        uses = self._uses[layer]
        uses[experts] += 1.0
        self._unsaved += len(experts)

    def first(self, slots: int, *, by_layer: bool = False) -> list[ExpertId]:
        """Return who gets `slots` slots before anybody asked: the most used, hottest last.

        Without any uses every layer gets its share. `by_layer` gives the first layers all they
        have, for policies that place whole layers.
        """
        candidates = [
            ExpertId(layer, expert)
            for layer, count in enumerate(self._experts)
            for expert in range(count)
        ]
        if not by_layer:
            # A stable sort leaves those of equal use in turns over the layers.
            candidates.sort(key=lambda each: (-self._uses[each], each.expert, each.layer))
        return candidates[:slots][::-1]

    def save(self, *, at_once: bool = True) -> None:
        """Keep the counts; without `at_once` only if many uses came since the last time."""
        if self._file is None or self._unsaved < (1 if at_once else SAVE_EVERY_USES):
            return
        rows = [
            [int(uses) for uses in row[:count]]
            for row, count in zip(self._uses, self._experts, strict=True)
        ]
        beside = self._file.with_suffix(".writing")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps({"version": VERSION, "uses": rows}), encoding="ascii")
            os.replace(beside, self._file)
        except OSError as error:
            self.notices = (f"Which experts are used most could not be kept: {error}.",)
        self._unsaved = 0

    def reset(self) -> None:
        """Forget all uses, on disk as well."""
        self._uses[:] = 0.0
        self._unsaved = 0
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _take_up(self, file: Path) -> None:
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"it has {file.stat().st_size} bytes")
            record = json.loads(file.read_text(encoding="ascii"))
            if record["version"] != VERSION:
                raise ValueError(f"it is of version {record['version']!r:.20}, not {VERSION}")
            uses = np.zeros_like(self._uses)
            for layer, (row, count) in enumerate(zip(record["uses"], self._experts, strict=True)):
                values = np.asarray(row, dtype=np.float64)
                if values.shape != (count,) or not ((values >= 0) & (values < _MOST_USES)).all():
                    raise ValueError(f"layer {layer} does not have {count} counts")
                uses[layer, :count] = values
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.notices = (f"{file.name}, the experts used most, is ignored: {error!s:.200}.",)
            return
        self._uses = uses / 2
