from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.tree import Tree
from tests.launcher.wheels import Index


@pytest.fixture
def index() -> Iterator[Index]:
    served = Index()
    yield served
    served.close()


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    """Under a path with a space and an accent, because people have those."""
    root = tmp_path / "Pré Scope"
    root.mkdir()
    made = Tree(root, tmp_path / "data folder")
    yield made
    made.close()
