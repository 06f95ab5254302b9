"""Matrices of expert activations, and a collection of them that is searched by cosine similarity.

The expert activation matrix (EAM) and its collection (EAMC) of MoE-Infinity (arXiv 2401.14361).
A matrix has one row per MoE layer for the prompt and one per MoE layer for decoding, for the two
are traced separately: rows 0 to L-1 and L to 2L-1. It counts the tokens each expert was given.
Matrices of requests of different length are compared by their rows divided by the row's sum.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ModelFilesError

FORMAT_VERSION = 1

Floats = NDArray[np.float64]


class ActivationMatrix:
    """Tokens per (row, expert). `counts` is [rows, experts], `totals` its sum over experts."""

    def __init__(self, rows: int, experts: int) -> None:
        self.counts = np.zeros((rows, experts))
        self.totals = np.zeros(rows)

    def add(self, row: int, demands: Mapping[int, int]) -> None:
        counts = self.counts[row]
        for expert, tokens in demands.items():
            counts[expert] += tokens
        self.totals[row] += sum(demands.values())

    def clear(self) -> None:
        self.counts[:] = 0.0
        self.totals[:] = 0.0

    def ratios(self) -> Floats:
        """Return each row divided by its sum; rows without activations stay zero."""
        return self.counts / np.maximum(self.totals, 1.0)[:, None]


class Collection:
    """At most `capacity` matrices of past requests, of `rows` x `experts` each.

    When it is full, a new matrix takes the place of the one it is most like, so that what is
    kept stays as different as what was seen.
    """

    def __init__(self, rows: int, experts: int, capacity: int) -> None:
        assert capacity > 0, f"a collection for {capacity} matrices"
        self.capacity = capacity
        self.changes = 0
        self._size = 0
        # The matrices lie side by side, so that one expert's column of all of them is contiguous.
        self._ratios = np.zeros((rows, experts, capacity), np.float32)
        self._squares = np.zeros((rows, capacity), np.float32)

    def __len__(self) -> int:
        return self._size

    @property
    def rows(self) -> int:
        return self._ratios.shape[0]

    @property
    def experts(self) -> int:
        return self._ratios.shape[1]

    def entry(self, index: int) -> NDArray[np.float32]:
        """Return matrix `index` as ratios [rows, experts]; each row sums to 1, or is zero."""
        assert 0 <= index < self._size, f"matrix {index} of {self._size}"
        return self._ratios[:, :, index]

    def similarities(self, matrix: ActivationMatrix) -> Floats:
        """Return the cosine similarity of every entry to `matrix` over the rows it has, [entries].

        An entry that has nothing in those rows has similarity 0.
        """
        match = Match(self)
        for row in np.flatnonzero(matrix.totals):
            demands = np.flatnonzero(matrix.counts[row])
            match.add(int(row), {int(e): int(matrix.counts[row, e]) for e in demands})
        return match.similarities()

    def add(self, matrix: ActivationMatrix) -> int:
        """Keep a finished request's matrix; return where it lies."""
        if self._size < self.capacity:
            index = self._size
            self._size += 1
        else:
            index = int(self.similarities(matrix).argmax())
        self._put(index, matrix.ratios().astype(np.float32))
        return index

    def save(self, path: Path) -> None:
        """Write the collection; a reader never finds half a file.

        A JSON header on the first line, then the ratios [entries, rows, experts] as little-endian
        float32, compressed by zlib.
        """
        ratios = np.moveaxis(self._ratios[:, :, : self._size], 2, 0)
        packed = zlib.compress(np.ascontiguousarray(ratios, "<f4").tobytes())
        header = {
            "format": FORMAT_VERSION,
            "shape": ratios.shape,
            "sha256": hashlib.sha256(packed).hexdigest(),
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(json.dumps(header).encode() + b"\n" + packed)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, rows: int, experts: int, capacity: int) -> Collection:
        """Read what `save` wrote; of more than `capacity` matrices the first ones are kept.

        Raises:
            ModelFilesError: the file is missing, damaged, of another version or another model's.
        """
        try:
            ratios = _unpack(path.read_bytes(), rows, experts)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, zlib.error) as error:
            raise ModelFilesError(
                f"The collection of activation traces {path} cannot be read: {error}.",
                "Delete it; it is collected again from the chats to come.",
            ) from error
        collection = cls(rows, experts, capacity)
        for index, entry in enumerate(ratios[:capacity]):
            collection._size = index + 1
            collection._put(index, entry)
        return collection

    def _put(self, index: int, ratios: NDArray[np.float32]) -> None:
        self._ratios[:, :, index] = ratios
        self._squares[:, index] = np.square(ratios).sum(1)
        self.changes += 1

    def weigh(self, row: int, experts: list[int], tokens: list[int]) -> NDArray[np.float32]:
        """Return the sum of tokens x ratio over some experts of a row, for every entry."""
        columns = self._ratios[row, experts, : self._size]
        return np.asarray(tokens, np.float32) @ columns

    def squares(self, seen: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return every entry's squared length over the rows in `seen`."""
        return seen.astype(np.float32) @ self._squares[:, : self._size]


def _unpack(content: bytes, rows: int, experts: int) -> NDArray[np.float32]:
    """Return the ratios in a saved collection, [entries, rows, experts], after every check."""
    first, _, packed = content.partition(b"\n")
    header = json.loads(first)
    if header["format"] != FORMAT_VERSION:
        raise ValueError(f"its format is {header['format']}, not {FORMAT_VERSION}")
    if header["sha256"] != hashlib.sha256(packed).hexdigest():
        raise ValueError("its checksum is wrong")
    entries, *shape = header["shape"]
    if shape != [rows, experts]:
        raise ValueError(f"its matrices are {shape}, not {[rows, experts]}")
    size_bytes = entries * rows * experts * 4
    raw = zlib.decompressobj().decompress(packed, size_bytes + 1)
    if len(raw) != size_bytes:
        raise ValueError(f"it holds {len(raw)} bytes, not {size_bytes}")
    ratios = np.frombuffer(raw, "<f4").reshape(entries, rows, experts)
    sums = ratios.sum(2)
    if not (ratios >= 0).all() or not ((abs(sums - 1) < 1e-3) | (sums == 0)).all():
        raise ValueError("its rows are not ratios")
    return ratios


class Match:
    """The similarity of a growing matrix to every entry of a collection, kept up as it grows.

    Adding a layer's k experts costs k x entries multiplications; asking costs rows x entries
    instead of rows x experts x entries.
    """

    def __init__(self, collection: Collection) -> None:
        self.matrix = ActivationMatrix(collection.rows, collection.experts)
        self._collection = collection
        self._changes = collection.changes
        self._dots = np.zeros((collection.rows, len(collection)), np.float32)
        self._squares = np.zeros(collection.rows)

    def add(self, row: int, demands: Mapping[int, int]) -> None:
        """Count a layer's tokens per expert."""
        assert self._changes == self._collection.changes, "the collection changed meanwhile"
        self.matrix.add(row, demands)
        counts = self.matrix.counts[row]
        self._squares[row] = counts @ counts
        if len(self._collection):
            self._dots[row] += self._collection.weigh(row, list(demands), list(demands.values()))

    def clear(self) -> None:
        self.matrix.clear()
        self._dots[:] = 0.0

    def similarities(self) -> Floats:
        """Return the cosine similarity over the rows seen so far, [entries], 0 to 1."""
        totals = self.matrix.totals
        seen = totals > 0
        shares = np.divide(1.0, totals, out=np.zeros_like(totals), where=seen)
        dots = shares.astype(np.float32) @ self._dots
        squares = float(self._squares @ np.square(shares)) * self._collection.squares(seen)
        similarities = np.zeros(len(dots))
        np.divide(dots, np.sqrt(squares), out=similarities, where=squares > 0)
        return similarities

    def best(self) -> tuple[int, float] | None:
        """Return the most similar entry and its similarity; None without entries or rows."""
        if not len(self._collection) or not self.matrix.totals.any():
            return None
        similarities = self.similarities()
        index = int(similarities.argmax())
        return index, float(similarities[index])
