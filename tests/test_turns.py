"""A test that has to be alone is, however many others come and go."""

from __future__ import annotations

import threading
from pathlib import Path

from assets.launcher.instance import FileLock
from tests.turns import turn

SOON_S = 30.0


class Visitor:
    """One thread that takes its turn and stays until it is told to leave."""

    def __init__(self, folder: Path, alone: bool) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._visit, args=(folder, alone))
        self.thread.start()

    def _visit(self, folder: Path, alone: bool) -> None:
        with turn(folder, alone):
            self.inside.set()
            assert self.leave.wait(SOON_S)

    def end(self) -> None:
        self.leave.set()
        self.thread.join()


def test_ordinary_ones_run_side_by_side(tmp_path: Path) -> None:
    both = [Visitor(tmp_path, alone=False) for _ in range(2)]
    assert all(one.inside.wait(SOON_S) for one in both)
    for one in both:
        one.end()


def test_one_alone_waits_for_who_is_there_and_nobody_overtakes_it(tmp_path: Path) -> None:
    first = Visitor(tmp_path, alone=False)
    assert first.inside.wait(SOON_S)
    lonely = Visitor(tmp_path, alone=True)
    door = FileLock(tmp_path / "door")
    while door.acquire():  # until it stands there
        door.release()
    late = Visitor(tmp_path, alone=False)
    assert not late.inside.wait(0.05)
    assert not lonely.inside.is_set()
    first.end()
    assert lonely.inside.wait(SOON_S)
    assert not late.inside.wait(0.05)
    lonely.end()
    assert late.inside.wait(SOON_S)
    late.end()
