from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from assets.launcher.download import Download, RefusedFault, Wheel
from assets.launcher.faults import InstallFault, NetworkFault, Stopped
from assets.launcher.places import ROOT
from tests.launcher.tree import wait_until
from tests.launcher.wheels import BLOCK_BYTES, Index, noise

NAME = "big-1.0-py3-none-any.whl"
SIZE = 3_000_000
# A connection that dies loses what was on its way: socket buffers on both sides.
IN_FLIGHT_BYTES = 1_500_000


def wheel(index: Index, sha256: str | None = None) -> Wheel:
    digest = sha256 or hashlib.sha256(index.files[NAME]).hexdigest()
    return Wheel("big", "1.0", index.url(NAME), digest)


def download(index: Index, folder: Path, sha256: str | None = None) -> Download:
    made = wheel(index, sha256)
    return Download(made, folder, lambda have, total: None, timeout_s=0.4, first_pause_s=0.01)


@pytest.fixture(autouse=True)
def big_file(index: Index) -> None:
    index.add(NAME, noise(SIZE))


def test_a_cut_connection_goes_on_where_it_stopped(index: Index, tmp_path: Path) -> None:
    index.cut_after = SIZE // 2
    fetched = download(index, tmp_path).fetch()
    assert fetched.read_bytes() == index.files[NAME]
    assert index.ranges[0] is None
    assert index.ranges[1] is not None
    assert index.sent[NAME] == SIZE


def test_a_silent_server_is_given_up_and_asked_again(index: Index, tmp_path: Path) -> None:
    index.stall_after = SIZE // 3
    assert download(index, tmp_path).fetch().read_bytes() == index.files[NAME]
    assert index.sent[NAME] == SIZE


def test_kill_9_loses_only_what_was_on_its_way(index: Index, tmp_path: Path) -> None:
    index.block_pause_s = 0.01
    part = tmp_path / f"{NAME}.part"
    program = (
        "import sys; from pathlib import Path; from assets.launcher.download import *\n"
        f"Download({wheel(index)!r}, Path(sys.argv[1]), lambda have, total: None).fetch()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    wait_until(lambda: part.exists() and part.stat().st_size > SIZE // 3, "a third of the file")
    child.kill()
    child.wait()
    kept = part.stat().st_size
    assert not (tmp_path / NAME).exists()

    index.block_pause_s = 0.0
    assert download(index, tmp_path).fetch().read_bytes() == index.files[NAME]
    assert index.ranges[-1] == f"bytes={kept}-"
    assert index.sent[NAME] <= SIZE + IN_FLIGHT_BYTES


def test_a_wrong_digest_is_refused_and_leaves_nothing(index: Index, tmp_path: Path) -> None:
    with pytest.raises(InstallFault, match="refused.*sha256"):
        download(index, tmp_path, sha256="0" * 64).fetch()
    assert list(tmp_path.iterdir()) == []
    assert index.sent[NAME] == 2 * SIZE


def test_a_file_that_changed_on_the_server_is_fetched_whole(index: Index, tmp_path: Path) -> None:
    index.block_pause_s = 0.005
    give_up_at = SIZE // 2

    def stop(have: int, total: int) -> None:
        if have > give_up_at:
            raise Stopped

    with pytest.raises(Stopped):
        Download(wheel(index), tmp_path, stop).fetch()
    index.add(NAME, noise(SIZE, seed=b"another build"))
    index.block_pause_s = 0.0
    assert download(index, tmp_path).fetch().read_bytes() == index.files[NAME]
    assert index.ranges[-1] is not None, "it offered its piece, with the old tag"


def test_pieces_of_two_versions_are_noticed_even_without_tags(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(noise(SIZE // 2, seed=b"an older build"))
    assert download(index, tmp_path).fetch().read_bytes() == index.files[NAME]


def test_a_complete_piece_is_only_verified(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(index.files[NAME])
    assert download(index, tmp_path).fetch().read_bytes() == index.files[NAME]
    assert NAME not in index.sent


def test_a_server_without_ranges_still_serves(index: Index, tmp_path: Path) -> None:
    index.ignore_ranges = True
    index.cut_after = 10 * BLOCK_BYTES
    assert download(index, tmp_path).fetch().read_bytes() == index.files[NAME]


def test_a_server_that_stays_away_is_named_with_the_numbers(index: Index, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(index.files[NAME][:1000])
    index.status = 503
    with pytest.raises(NetworkFault, match=r"answered 503; 1,000 of .* bytes are here"):
        download(index, tmp_path).fetch()
    assert (tmp_path / f"{NAME}.part").stat().st_size == 1000


def test_a_refusal_is_left_to_pip(index: Index, tmp_path: Path) -> None:
    index.status = 403
    with pytest.raises(RefusedFault, match="403"):
        download(index, tmp_path).fetch()


def test_a_finished_file_is_not_asked_for_again(index: Index, tmp_path: Path) -> None:
    download(index, tmp_path).fetch()
    asked = len(index.ranges)
    download(index, tmp_path).fetch()
    assert len(index.ranges) == asked


@pytest.mark.parametrize("path", ["..%2F..%2Fevil.whl", "..%5Cevil.whl", "a/../evil.whl#sha256=0"])
def test_an_index_cannot_choose_the_folder(path: str) -> None:
    assert Wheel("big", "1.0", f"https://host/{path}", "").file_name == "evil.whl"
