"""The GGUF files of one model: found, opened and checked, with one table of all their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.gguf_header import GgufTensor, damaged, read_header
from runtime.gguf_names import SUFFIX, models_among, part_names, part_of
from runtime.gguf_types import BLOCKS
from runtime.safetensors_files import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsFiles,
    TensorEntry,
)

# What a type's bytes are to torch. Blocks are bytes; `runtime.gguf_blocks` says what they mean.
READABLE = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"), "uint8"),
    **dict.fromkeys(("Q4_K", "Q5_K", "Q6_K", "MXFP4"), "uint8"),
}
MAX_PARTS = 1000
_CHOOSE = "Choose one of the .gguf files."


class GgufFiles(SafetensorsFiles):
    """The open GGUF files of one model; read like the shards of a safetensors model.

    In `tensors`, a quantised tensor has the dtype uint8, and its last size counts bytes;
    `logical_shape` says what it stands for. `metadata` is that of the first part.

    Raises:
        ModelFilesError: a file is missing, damaged or hostile; the message names it.
        UnsupportedModelError: a version or tensor type cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._start()
        self.metadata: dict[str, Any] = {}
        self.paths = gguf_paths(path)
        try:
            for number in range(len(self.paths)):
                self._open_part(number)
            self._check_total()
        except BaseException:
            self.close()
            raise

    def _open_part(self, number: int) -> None:
        path = self.paths[number]
        file = self._open(path)
        header = read_header(file, path)
        parts = header.metadata.get("split.count", 1)
        if parts not in (len(self.paths), 0) or header.metadata.get("split.no", number) != number:
            place = f"part {header.metadata.get('split.no', 0)} of {parts}, counted from 0"
            damaged(path, f"it says that it is {place}")
        if number == 0:
            self.metadata = header.metadata
        for tensor in header.tensors:
            other = self.tensors.get(tensor.name)
            if other is not None:
                damaged(path, f"tensor {tensor.name!r} is also in {self.paths[other.file].name}")
            self.tensors[tensor.name] = _entry(tensor, number, path)

    def _check_total(self) -> None:
        told = self.metadata.get("split.tensors.count", len(self.tensors))
        if told != len(self.tensors):
            damaged(self.paths[0], f"it tells of {told} tensors, but there are {len(self.tensors)}")


def logical_shape(entry: TensorEntry) -> tuple[int, ...]:
    """Return the shape of the numbers that `entry`, of a `GgufFiles`, stands for."""
    per_block, block_bytes = BLOCKS[entry.stored]
    if entry.dtype != "uint8":
        return entry.shape
    return (*entry.shape[:-1], entry.shape[-1] // block_bytes * per_block)


def is_gguf(path: Path) -> bool:
    """Say whether `path` is a GGUF file, or a folder whose weights are only there as GGUF."""
    if path.is_file():
        return path.suffix == SUFFIX
    if (path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists():
        return False
    return bool(_models_in(path))


def gguf_paths(path: Path) -> tuple[Path, ...]:
    """Return the parts of the model at `path`, a file (any part) or a folder, in order.

    Raises:
        ModelFilesError: there is none, more than one, or a part is missing.
    """
    if not path.is_file():
        models = _models_in(path)
        if len(models) != 1:
            names = ", ".join(model.name for model in models[:4])
            what = f"{len(models)} GGUF models ({names})" if models else "no GGUF model"
            raise ModelFilesError(f"{path.name} holds {what}.", _CHOOSE)
        path = models[0]
        _check_link(path)
    part = part_of(path.name)
    if part is None:
        return (path,)
    stem, _, parts = part
    if not 1 <= parts <= MAX_PARTS:
        damaged(path, f"its name tells of {parts} parts")
    paths = [path.with_name(name) for name in part_names(stem, parts)]
    if path not in paths:
        damaged(path, f"its name is that of no part of {parts}")
    for other in paths:
        if not other.is_file():
            raise ModelFilesError(
                f"{other.name} is missing: this model has {parts} files.",
                "Download the missing file into the same folder.",
            )
        if other != path:
            _check_link(other)
    return tuple(paths)


def _models_in(folder: Path) -> list[Path]:
    try:
        return models_among(folder.iterdir())
    except OSError:
        return []


def _entry(tensor: GgufTensor, number: int, path: Path) -> TensorEntry:
    dtype = READABLE.get(tensor.type)
    if dtype is None:
        readable = ", ".join(sorted(READABLE))
        raise UnsupportedModelError(
            f"{path.name}: {tensor.type} tensors cannot be read yet ({tensor.name[:80]}).",
            f"Choose a version of this model made of {readable}, such as Q4_K_M or Q8_0.",
        )
    shape = tensor.shape
    if dtype == "uint8":
        per_block, block_bytes = BLOCKS[tensor.type]
        shape = (*shape[:-1], shape[-1] // per_block * block_bytes)
    return TensorEntry(
        name=tensor.name,
        file=number,
        begin=tensor.begin,
        size_bytes=tensor.size_bytes,
        stored=tensor.type,
        dtype=dtype,
        shape=shape,
    )


def _check_link(path: Path) -> None:
    """Refuse a file, found and not named by a person, that is a link out of its folder."""
    if not path.is_symlink():
        return
    # The hub's download cache keeps `snapshots/<commit>/<file>` as links to `blobs/<hash>`.
    home = path.parent.resolve()
    if path.resolve().parent not in (home, home.parent.parent / "blobs"):
        damaged(path, "it is a link that leads out of the model's folder")
