"""How the experts of a load are held and where they come from: as stored, or quantised and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.adapter import MoeLayer
from runtime.core import LoadProgress
from runtime.errors import ModelFilesError
from runtime.expert_file_header import LayerExperts, describe_source, file_path
from runtime.expert_file_making import KeptExperts, LayerForms, Quantiser, quantised_layer
from runtime.store import ExpertSource
from runtime.store_recipes import LayerSource, RecipeSource, TensorFiles


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

    def open(
        self, files: TensorFiles, paths: Sequence[Path], folder: Path, name: str, cache: Path | None
    ) -> ExpertSource:
        """Return where the experts are read from; it takes over `files`.

        Quantised ones are kept in a file under `cache` that belongs to `folder` and the weights in
        `paths`; None keeps nothing.

        Raises:
            ModelFilesError: a file of the model is gone.
        """
        recipes = RecipeSource(files, self.plain)
        if self.quantiser is None:
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
        return KeptExperts(recipes, self.forms, self.quantiser, header, path)


def hold_experts(
    layers: Sequence[MoeLayer], plain: Sequence[LayerSource], quantiser: Quantiser | None
) -> HeldExperts:
    """Decide how the experts of `layers`, read from `plain`, are held; None holds them as stored.

    What the files hold quantised stays so: quantising it again would only add errors.
    """
    as_stored = HeldExperts(tuple(plain), tuple(plain))
    if quantiser is None:
        return as_stored
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
