"""Quantising experts while they are loaded, and keeping them: read once, made once, then only read.

`KeptExperts` stands between the checkpoint and whoever holds experts in memory. Where a finished
file fits it is read and the checkpoint is not touched; otherwise every expert is read plain,
quantised into its slot layout and written to the file on the way. A disk that is full takes the
file away, not the model.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.core import ExpertId, LoadProgress
from runtime.errors import CancelledError, DiskError, ModelFilesError
from runtime.expert_file import ExpertFile, ExpertFileWriter, open_expert_file
from runtime.expert_file_header import ExpertFileHeader
from runtime.formats import ExpertFormat, Form, FormKind, Matrix, lay_out
from runtime.kernels import views
from runtime.store import ExpertSource
from runtime.store_recipes import bytes_in
from runtime.weight_forms import PIECE_ROWS, Codes, encode, memories, parts_of

SYNC_BYTES = 64 * 2**20
PIECE_NUMBERS = 2**19
MAKERS = 4
SCRATCH_BYTES = 256 * 2**20
_QUANTISING_BYTES = 8 * 2**20
"""What quantising a few rows makes on the way, in one thread."""

log = logging.getLogger("prescope.experts")


@dataclass(frozen=True)
class Quantiser:
    """The arithmetic: `form_of` chooses how a matrix (outputs, inputs) is held, None: as it is.

    `quantise` takes the matrix (outputs, inputs) in any float dtype. Both are pure.
    """

    kind: FormKind
    form_of: Callable[[tuple[int, int]], Form | None]
    quantise: Callable[[Tensor, Form], Codes]

    def in_pieces(
        self, matrix: Tensor, form: Form, stop: Callable[[], bool], name: str
    ) -> Iterator[Codes]:
        """Quantise a few rows at a time, so that memory stays small and `stop` is asked often.

        Raises:
            CancelledError: `stop` returned True.
            ModelFilesError: the matrix, called `name`, has numbers that are not finite.
        """
        rows = max(PIECE_ROWS, PIECE_NUMBERS // matrix.shape[1] // PIECE_ROWS * PIECE_ROWS)
        for begin in range(0, len(matrix), rows):
            if stop():
                raise CancelledError("Loading was stopped.")
            codes = self.quantise(matrix[begin : begin + rows], form)
            # One number that is not finite spoils its whole group, and groups are fewer to look at.
            if not bool(torch.isfinite(codes.scales).all()):
                raise ModelFilesError(
                    f"{name} has numbers that are not finite, so it cannot be quantised.",
                    "Load the model's experts as stored, or download it again.",
                )
            yield codes

    def fingerprint(self) -> str:
        """Name the arithmetic and the packing by what they make of a fixed matrix."""
        numbers = torch.arange(96 * 512, dtype=torch.float64)
        matrix = (torch.sin(numbers * 0.7) * (1 + numbers % 29)).float().view(96, 512)
        form = self.form_of((96, 512))
        if form is None:
            return "none"
        layout = lay_out(parts_of(Matrix("probe", (96, 512), form)))
        flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
        probe = Matrix("probe", (96, 512), form)
        encode(self.quantise(matrix, form), probe, memories(flat.numpy(), layout))
        return hashlib.sha256(bytes_in(flat)).hexdigest()[:16]


@dataclass(frozen=True)
class LayerForms:
    """One MoE layer before and after: `transposed` says that plain matrices are (inputs, outputs).

    `held` has the parts of `plain` in the same order, those of a quantised matrix in its place.
    """

    experts: int
    plain: ExpertFormat
    held: ExpertFormat
    transposed: bool

    def convert(
        self,
        plain: Tensor,
        held: Tensor,
        quantiser: Quantiser,
        stop: Callable[[], bool],
        whose: str,
    ) -> None:
        """Write the expert in `plain` into `held` as it is held; padding becomes zero.

        Raises:
            CancelledError: `stop` returned True.
            ModelFilesError: the expert, called `whose`, has numbers that are not finite.
        """
        sources, targets = views(plain, self.plain), views(held, self.held)
        places = memories(held.numpy(), self.held)
        held.zero_()
        matrices = {matrix.name: matrix for matrix in self.held.matrices}
        for name, source in sources.items():
            matrix = matrices.get(name)
            if matrix is None:
                targets[name].copy_(source)
                continue
            weight = source.t() if self.transposed else source
            first = 0
            for codes in quantiser.in_pieces(weight, matrix.form, stop, f"{name} of {whose}"):
                encode(codes, matrix, places, first)
                first += codes.rows


def quantised_layer(
    experts: int,
    plain: ExpertFormat,
    weights: Sequence[str],
    transposed: bool,
    quantiser: Quantiser,
) -> LayerForms:
    """Say how a layer is held whose parts named `weights` are matrices to be quantised."""
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    matrices = []
    for part in plain.parts:
        shape = part.shape[::-1] if transposed else part.shape
        form = None
        if part.name in weights and len(shape) == 2:
            form = quantiser.form_of((shape[0], shape[1]))
        if form is None:
            tensors.append((part.name, part.shape, part.dtype))
            continue
        matrices.append(Matrix(part.name, (shape[0], shape[1]), form))
        tensors += parts_of(matrices[-1])
    return LayerForms(experts, plain, lay_out(tensors, matrices), transposed)


def makers_of(layers: Sequence[LayerForms]) -> int:
    """Return how many experts are made at once: as many as memory may lie beside, at least one."""
    return max(1, min(MAKERS, SCRATCH_BYTES // _largest(layers)))


def making_bytes(layers: Sequence[LayerForms]) -> int:
    """Return what all who make experts of `layers` need together, beside their places."""
    return makers_of(layers) * (_largest(layers) + _QUANTISING_BYTES)


def _largest(layers: Sequence[LayerForms]) -> int:
    return max((layer.plain.size_bytes for layer in layers), default=1)


class KeptExperts:
    """The quantised experts of one model, from their file or made on the way into it.

    Any thread may `read`, several at once. `complete` once, when everything that
    wanted to be in memory has been read; `close` once nobody reads. `notices` are sentences for a
    person: why a file was not used, or why none is kept.
    """

    def __init__(
        self,
        plain: ExpertSource,
        layers: Sequence[LayerForms],
        quantiser: Quantiser,
        header: ExpertFileHeader,
        path: Path | None,
    ) -> None:
        """Open the file at `path`, or begin it; None keeps nothing. No disk stops the load."""
        self.notices: list[str] = []
        self.stop: Callable[[], bool] = lambda: False
        """Asked between pieces of a matrix; then `read` raises CancelledError."""
        self._plain = plain
        self._layers = tuple(layers)
        self._quantiser = quantiser
        self._writing = threading.Lock()
        """Held for everything that changes here: the writer, the file, what is written, notices."""
        self._file: ExpertFile | None = None
        self._writer: ExpertFileWriter | None = None
        self._written: set[ExpertId] = set()
        self._unsynced_bytes = 0
        self._turns = makers_of(layers)
        self._scratch_bytes = _largest(layers)
        self._scratch: queue.LifoQueue[Tensor | None] = queue.LifoQueue()
        for _ in range(self._turns):
            self._scratch.put(None)
        if path is None:
            return
        self._file, ignored = open_expert_file(path, header)
        if ignored:
            self._note(f"{ignored} They are made again.")
        if self._file is None:
            try:
                self._writer = ExpertFileWriter(path, header)
            except DiskError as error:
                self._keep_nothing(error)

    @property
    def file(self) -> ExpertFile | None:
        """The finished file, once there is one."""
        return self._file

    @property
    def activity(self) -> str:
        """What `read` does now, as the beginning of a sentence."""
        if self._file is not None:
            return f"Reading the {self._quantiser.kind} experts"
        return f"Quantising the experts to {self._quantiser.kind}"

    def read(self, expert: ExpertId, into: memoryview) -> None:
        """Fill `into`, held.size_bytes writable bytes, with one quantised expert.

        Raises:
            ModelFilesError: the checkpoint cannot be read.
            CancelledError: `stop` returned True.
        """
        file = self._file
        if file is None:
            self._make_or_take_up(expert, into)
            return
        try:
            file.read(expert, into)
        except ModelFilesError as damage:
            self._heal(file, expert, into, damage)

    def complete(
        self, progress: Callable[[LoadProgress], None], cancelled: Callable[[], bool]
    ) -> None:
        """Make every expert that nobody has read yet, and finish the file.

        Raises:
            ModelFilesError: the checkpoint cannot be read.
            CancelledError: `cancelled` said so; what is written is taken up the next time.
        """
        if self._file is not None:
            return
        if self._writer is not None:
            self._make_the_rest(progress, cancelled)
        for _ in [self._scratch.get() for _ in range(self._turns)]:
            self._scratch.put(None)
        with self._writing:
            if self._writer is not None:
                try:
                    self._file, self._writer = self._writer.finish(), None
                except DiskError as error:
                    self._keep_nothing(error)

    def close(self) -> None:
        """Let go of the file and the checkpoint; what is not finished is taken up the next time."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._plain.close()

    def _make_the_rest(
        self, progress: Callable[[LoadProgress], None], cancelled: Callable[[], bool]
    ) -> None:
        total = sum(layer.experts * layer.held.size_bytes for layer in self._layers)
        done = sum(self._layers[expert.layer].held.size_bytes for expert in self._written)

        def make(expert: ExpertId) -> None:
            held = torch.empty(self._layers[expert.layer].held.size_bytes, dtype=torch.uint8)
            self.read(expert, bytes_in(held))

        with ThreadPoolExecutor(MAKERS, "prescope-quantise") as makers:
            for number, layer in enumerate(self._layers):
                everybody = [ExpertId(number, index) for index in range(layer.experts)]
                left = [expert for expert in everybody if expert not in self._written]
                for _ in makers.map(make, left):
                    if cancelled():
                        raise CancelledError("Loading was stopped.")
                    if self._writer is None:
                        return
                    done += layer.held.size_bytes
                    text = f"{self.activity}, layer {number + 1} of {len(self._layers)}"
                    progress(LoadProgress(text, done, total))

    def _make_or_take_up(self, expert: ExpertId, into: memoryview) -> None:
        if self._taken_up(expert, into):
            return
        self._make(expert, into)
        with self._writing:
            if self._writer is None:
                return
            try:
                self._writer.write(expert, into)
                self._unsynced_bytes += len(into)
                if self._unsynced_bytes >= SYNC_BYTES:
                    self._unsynced_bytes = 0
                    self._writer.sync()
            except DiskError as error:
                self._keep_nothing(error)
            self._written.add(expert)

    def _taken_up(self, expert: ExpertId, into: memoryview) -> bool:
        """Say whether an earlier load wrote the expert, which then is in `into`."""
        with self._writing:
            if self._writer is None:
                return False
            try:
                found = self._writer.read(expert, into)
            except DiskError as error:
                self._keep_nothing(error)
                return False
            if found:
                self._written.add(expert)
            return found

    def _make(self, expert: ExpertId, into: memoryview) -> None:
        layer = self._layers[expert.layer]
        scratch = self._scratch.get()
        try:
            if self.stop():
                raise CancelledError("Loading was stopped.")
            if scratch is None:
                scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8)
            plain = scratch[: layer.plain.size_bytes]
            self._plain.read(expert, bytes_in(plain))
            target = torch.frombuffer(into, dtype=torch.uint8)
            whose = f"expert {expert.expert} of MoE layer {expert.layer}"
            layer.convert(plain, target, self._quantiser, self.stop, whose)
        finally:
            self._scratch.put(scratch)

    def _heal(
        self, file: ExpertFile, expert: ExpertId, into: memoryview, damage: ModelFilesError
    ) -> None:
        self._make(expert, into)
        with self._writing:
            self._put_back(file, expert, into, damage)

    def _put_back(
        self, file: ExpertFile, expert: ExpertId, data: memoryview, damage: ModelFilesError
    ) -> None:
        try:
            healed = file.heal(expert, data)
        except DiskError as error:
            self._note(f"{damage.message} It was made again, but not kept: {error.message}")
            return
        if healed:
            self._note(f"{damage.message} It was made again.")
        else:
            self._note(f"{damage.message} The file is deleted; the next load makes a new one.")
            with suppress(OSError):  # Windows deletes no open file; the next load replaces it
                file.path.unlink()

    def _keep_nothing(self, error: DiskError) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._note(
            f"{error.message} The model runs with quantised experts all the same, but the next"
            f" load has to quantise them again. {error.next_step}"
        )

    def _note(self, text: str) -> None:
        log.info("%s", text)
        self.notices.append(text)
