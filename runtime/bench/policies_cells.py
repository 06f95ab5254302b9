"""Which cells `bench policies` runs: a rule, written down before any result was looked at.

Main cells: every stratum model x residency x batch x phase, two machines for decode and one for
prefill. Each stratum's links follow from its place (a Latin square, so that every link is there
equally often). Machines are the cross card x link x CPU x host overhead, where no link is faster
than the card's slot, in the order of a hash of their names; of those with its link a stratum takes
the next one, round robin, whose memory holds the dense weights, a reserve and the slots.
gpt-oss-120b at 50 % fits no card here: the next one of 32 GB stands in, and `fits` is false.

Paper cells: the PreScope paper's machine, its models in bf16 that have published routing
statistics, batch 4, 16 and 64, decode, at the two largest residencies of the axis that its 32 GB
hold beside the KV cache of 64 requests of 576 tokens.

`assets/bench/cells.json` is the list; a test holds it to this rule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from runtime.bench.policies_models import MODELS, BenchModel
from runtime.machines import CARDS, CPUS, HOST_LAYER_S, LINKS, MACHINES, Machine

Phase = Literal["decode", "prefill"]
Setting = Literal["main", "paper"]

CELLS_FILE = Path(__file__).resolve().parents[2] / "assets" / "bench" / "cells.json"
PHASES: tuple[Phase, ...] = ("decode", "prefill")
RESIDENCIES = (0.12, 0.25, 0.37, 0.5)
BATCHES = (1, 4, 16, 64)
MAIN_MODELS = tuple(name for name in MODELS if not name.endswith("bf16"))
MACHINES_PER_STRATUM = {"decode": 2, "prefill": 1}
RESERVE_BYTES = 1_500_000_000
PAPER_MACHINE = MACHINES["paper-a100"]
PAPER_RESIDENCIES = {
    "Mixtral-8x7B bf16": (0.12, 0.25),
    "DeepSeek-V2-Lite bf16": (0.37, 0.5),
    "Qwen3-30B-A3B bf16": (0.25, 0.37),
}
PAPER_BATCHES = (4, 16, 64)
FULL_SHARE = 24
"""`--full` keeps every cell of the cross whose hash is 0 modulo this."""


@dataclass(frozen=True)
class Cell:
    """One comparison: all policies on one trace and one machine."""

    machine: Machine
    model: str
    residency: float
    batch: int
    phase: Phase
    setting: Setting = "main"

    @property
    def name(self) -> str:
        share = f"{self.residency * 100:.0f}%"
        parts = (self.machine.name, self.model, share, f"batch {self.batch}", self.phase)
        return ", ".join((*parts, self.setting))

    @property
    def fits(self) -> bool:
        """Whether the card's memory holds the dense weights, a reserve and the slots."""
        return fits(self.machine, MODELS[self.model], self.residency)

    def to_json(self) -> dict[str, Any]:
        return {
            "card": self.machine.card,
            "link": self.machine.link,
            "cpu": self.machine.cpu,
            "host_layer_s": self.machine.host_layer_s,
            "model": self.model,
            "residency": self.residency,
            "batch": self.batch,
            "phase": self.phase,
            "setting": self.setting,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cell:
        machine = Machine(value["card"], value["link"], value["cpu"], value["host_layer_s"])
        rest = (value[key] for key in ("model", "residency", "batch", "phase", "setting"))
        return cls(machine, *rest)


def fits(machine: Machine, model: BenchModel, residency: float) -> bool:
    """Say whether the machine's card holds this share of the model's experts and the rest."""
    needed_bytes = model.dense_bytes + residency * model.experts_bytes + RESERVE_BYTES
    return needed_bytes <= CARDS[machine.card].vram_bytes


def machines() -> list[Machine]:
    """Return the whole cross of machines, in the order of a hash of their names."""
    cross = [
        Machine(card.name, link, cpu, host_layer_s)
        for card in CARDS.values()
        for link, cpu, host_layer_s in product(card.links, CPUS, HOST_LAYER_S)
    ]
    return sorted(cross, key=lambda machine: _digest(machine.name))


def cells_by_rule() -> list[Cell]:
    """Return the fixed cells as the rule above makes them."""
    waiting = {link: [m for m in machines() if m.link == link] for link in LINKS}
    links = tuple(LINKS)
    cells = []
    for phase, model, residency, batch in product(PHASES, MAIN_MODELS, RESIDENCIES, BATCHES):
        place = MAIN_MODELS.index(model) + RESIDENCIES.index(residency) + BATCHES.index(batch)
        for number in range(MACHINES_PER_STRATUM[phase]):
            with_link = waiting[links[(place + 2 * number) % len(links)]]
            chosen = _next_that_fits(with_link, MODELS[model], residency)
            with_link.remove(chosen)
            with_link.append(chosen)
            cells.append(Cell(chosen, model, residency, batch, phase))
    for model, residencies in PAPER_RESIDENCIES.items():
        for residency, batch in product(residencies, PAPER_BATCHES):
            cells.append(Cell(PAPER_MACHINE, model, residency, batch, "decode", "paper"))
    return cells


def fixed_cells() -> list[Cell]:
    """Read the committed list."""
    return [Cell.from_json(value) for value in json.loads(CELLS_FILE.read_text("utf-8"))]


def quick_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return a subset: each model with every other batch in decode, each model once in prefill.

    Of the paper's cells the ones of batch 64 at the larger residency; else the first by hash.
    """
    chosen: dict[tuple[object, ...], Cell] = {}
    for cell in by_hash(cells):
        if cell.setting == "paper":
            if cell.batch == 64 and cell.residency == PAPER_RESIDENCIES[cell.model][-1]:
                chosen.setdefault(("paper", cell.model), cell)
        elif cell.phase == "decode":
            if (MAIN_MODELS.index(cell.model) + BATCHES.index(cell.batch)) % 2 == 0:
                chosen.setdefault((cell.phase, cell.model, cell.batch), cell)
        else:
            chosen.setdefault((cell.phase, cell.model), cell)
    return list(chosen.values())


def full_cells() -> list[Cell]:
    """Return the thinned cross: one cell in `FULL_SHARE` of those that fit, chosen by hash."""
    cross = product(machines(), MAIN_MODELS, RESIDENCIES, BATCHES, PHASES)
    cells = [Cell(*axes) for axes in cross]
    kept = [cell for cell in cells if int(_digest(cell.name), 16) % FULL_SHARE == 0 and cell.fits]
    return [*kept, *(cell for cell in fixed_cells() if cell.setting == "paper")]


def by_hash(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells in an order that has nothing to do with their axes."""
    return sorted(cells, key=lambda cell: _digest(cell.name))


def write_cells(path: Path = CELLS_FILE) -> None:
    """Write the rule's cells, one per line, as the committed file has them."""
    lines = ",\n".join(json.dumps(cell.to_json()) for cell in cells_by_rule())
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _next_that_fits(waiting: Sequence[Machine], model: BenchModel, residency: float) -> Machine:
    largest = max(card.vram_bytes for card in CARDS.values())
    stand_in = next(m for m in waiting if CARDS[m.card].vram_bytes == largest)
    return next((m for m in waiting if fits(m, model, residency)), stand_in)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
