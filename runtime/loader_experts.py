"""How the experts of a load are held and where they come from: as stored, or quantised and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from runtime.adapter import MoeLayer
from runtime.core import ExpertsWish, LoadProgress
from runtime.errors import ModelFilesError
from runtime.expert_file_header import LayerExperts, describe_source, file_path
from runtime.expert_file_making import (
    KeptExperts,
    LayerForms,
    Quantiser,
    making_bytes,
    quantised_layer,
)
from runtime.formats import FormKind
from runtime.quantize import form_of, quantise
from runtime.store import ExpertSource
from runtime.store_loading import LOAD_READERS
from runtime.store_recipes import LayerSource, RecipeSource, TensorFiles, reading_bytes

_AGAIN_EACH_TIME = (
    "RAM does not hold all experts, and without a file on the disk the others are quantised again"
    " whenever they are needed: that is slow. Make room on the disk, or load the experts as stored."
)


@dataclass(frozen=True)
class HeldExperts:
    """The experts of a model as they will be held.

    `sources` have the formats in which they are held; `plain` is what the files have. `quantiser`
    and `forms` are there if one becomes the other. `remarks` are sentences for a person.
    """

    sources: tuple[LayerSource, ...]
    plain: tuple[LayerSource, ...]
    quantiser: Quantiser | None = None
    forms: tuple[LayerForms, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def reading_bytes(self) -> int:
        """What all readers of experts together need beside their places."""
        if self.quantiser is not None:
            return making_bytes(self.forms)
        return LOAD_READERS * reading_bytes(self.sources)

    def open(
        self,
        files: TensorFiles,
        paths: Sequence[Path],
        folder: Path,
        name: str,
        cache: Path | None,
        cancelled: Callable[[], bool],
    ) -> ExpertSource:
        """Return where the experts are read from; it takes over `files`.

        Quantised ones are kept in a file under `cache` that belongs to `folder` and the weights in
        `paths`; None keeps nothing. `cancelled` is asked until `finish`.

        Raises:
            ModelFilesError: a file of the model is gone.
        """
        recipes = RecipeSource(files, self.plain)
        if self.quantiser is None:
            recipes.stop = cancelled
            return recipes
        try:
            header = describe_source(
                folder,
                paths,
                model=name,
                kind=self.quantiser.kind,
                quantiser=self.quantiser.fingerprint(),
                layers=[LayerExperts(form.experts, form.held) for form in self.forms],
            )
        except OSError as error:
            raise ModelFilesError(
                f"A file of {name} is gone: {error}.", "Load the model again."
            ) from error
        path = None if cache is None else file_path(cache, folder, self.quantiser.kind)
        kept = KeptExperts(recipes, self.forms, self.quantiser, header, path)
        kept.stop = cancelled
        recipes.stop = lambda: kept.stop()
        if kept.file is not None:
            kept.file.read_past_cache(not kept.file.cached)
        return kept


def hold_experts(
    layers: Sequence[MoeLayer], plain: Sequence[LayerSource], wish: ExpertsWish
) -> HeldExperts:
    """Decide how the experts of `layers`, read from `plain`, are held.

    What the files hold quantised stays so: quantising it again would only add errors.
    """
    as_stored = HeldExperts(tuple(plain), tuple(plain))
    if wish == "as stored":
        return as_stored
    quantiser = quantiser_for(wish)
    forms = []
    for layer, source in zip(layers, plain, strict=True):
        if source.format.matrices:
            kinds = {matrix.form.kind for matrix in source.format.matrices}
            remark = (
                f"The experts of this model are quantised already ({', '.join(sorted(kinds))}),"
                f" so they stay as they are instead of becoming {quantiser.kind}."
            )
            return replace(as_stored, remarks=(remark,))
        weights = (layer.math.up, layer.math.down)
        transposed = layer.math.transposed
        forms.append(quantised_layer(layer.experts, source.format, weights, transposed, quantiser))
    if not any(form.held.matrices for form in forms):
        remark = f"No expert of this model can be held as {quantiser.kind}: no matrix fits it."
        return replace(as_stored, remarks=(remark,))
    sources = tuple(
        replace(source, format=form.held) for source, form in zip(plain, forms, strict=True)
    )
    return HeldExperts(sources, tuple(plain), quantiser, tuple(forms))


def naming(
    source: ExpertSource, progress: Callable[[LoadProgress], None]
) -> Callable[[LoadProgress], None]:
    """Return `progress` with sentences that say what reading from `source` means."""
    if not isinstance(source, KeptExperts):
        return progress
    kept = source

    def named(step: LoadProgress) -> None:
        progress(
            replace(step, text=step.text.replace("Reading the experts of", f"{kept.activity},"))
        )

    return named


def finish(
    source: ExpertSource,
    progress: Callable[[LoadProgress], None],
    cancelled: Callable[[], bool],
    all_in_ram: bool,
) -> tuple[str, ...]:
    """End a load: complete the file of quantised experts, and return what a person should know.

    `all_in_ram` says that nothing is read from `source` any more.

    Raises:
        ModelFilesError: the checkpoint cannot be read.
        CancelledError: `cancelled` said so; what is written is taken up the next time.
    """
    if not isinstance(source, KeptExperts):
        return ()
    source.complete(progress, cancelled)
    source.stop = lambda: False
    if source.file is not None:
        source.file.read_past_cache(True)  # what is read again would lie in RAM twice
    elif not all_in_ram:
        return (*source.notices, _AGAIN_EACH_TIME)
    return tuple(source.notices)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let threads that unpack or quantise experts at the same time have one core each.

    The operations are small: several readers with a core each are faster than one that shares
    every operation between all cores, and many times faster than several that do.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quantiser_for(kind: FormKind) -> Quantiser:
    """Return the arithmetic that makes int8 or int4 of a matrix."""
    return Quantiser(kind, partial(form_of, kind), quantise)
