"""Installing for real, from an index of tiny packages."""

from __future__ import annotations

import hashlib
import json
import os
import signal

import pytest

from tests.launcher.tree import Tree, wait_until
from tests.launcher.wheels import Index, borrowed_pip, make_wheel

TORCH = "torch-1.0-py3-none-any.whl"
TORCH_BYTES = 3_000_000
IN_FLIGHT_BYTES = 1_500_000
VERIFY = "import json, torch\nprint(json.dumps({'torch': torch.__version__, 'device': 'cpu'}))\n"


pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals and links"),
    # Each test starts a dozen Pythons; on a busy machine that takes its time.
    pytest.mark.timeout(300),
]


class Shop:
    """The index, and the lock that names what is in it."""

    def __init__(self, index: Index, tree: Tree) -> None:
        self.index = index
        self.tree = tree
        tree.environ["PIP_INDEX_URL"] = index.simple
        name, pip = borrowed_pip()
        digest = index.add(name, pip)
        self.write("pip.txt", f"pip=={name.split('-')[1]} --hash=sha256:{digest}\n")
        self.offer("small", "1.0", "requirements.txt")
        self.offer("probing", "1.0", "test.txt")
        self.offer_torch("1.0")
        (tree.root / "assets" / "launcher" / "verify.py").write_text(VERIFY)

    def write(self, name: str, text: str) -> None:
        (self.tree.lock_folder / name).write_text(text)

    def offer(self, project: str, version: str, lock: str) -> None:
        wheel = make_wheel(project, version, {f"{project}.py": f"version = {version!r}\n"})
        digest = self.index.add(f"{project}-{version}-py3-none-any.whl", wheel)
        self.write(lock, f"{project}=={version} --hash=sha256:{digest}\n")

    def offer_torch(self, version: str) -> None:
        modules = {"torch.py": f"__version__ = {version!r}\n"}
        wheel = make_wheel("torch", version, modules, TORCH_BYTES)
        self.index.add(f"torch-{version}-py3-none-any.whl", wheel)
        self.write("torch.txt", f"torch=={version}\n")

    def current(self) -> dict[str, str]:
        record: dict[str, str] = json.loads(self.tree.places.current.read_text())
        return record

    def environments(self) -> list[str]:
        return sorted(path.name for path in self.tree.places.data.glob("env-*") if path.is_dir())

    def versions(self) -> str:
        done = self.tree.run(
            "python", "-c", "import small, torch; print(small.version, torch.__version__)"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def shop(index: Index, tree: Tree) -> Shop:
    return Shop(index, tree)


def test_from_nothing_and_then_an_update_beside(shop: Shop, tree: Tree) -> None:
    assert shop.versions() == "1.0 1.0"
    first = shop.environments()
    assert shop.current()["torch"] == "1.0"
    assert not tree.places.wheels.exists(), "downloads are removed once they are installed"
    sent = dict(shop.index.sent)
    assert shop.versions() == "1.0 1.0"
    assert shop.index.sent == sent, "a second start asks the index for nothing"

    shop.offer("small", "2.0", "requirements.txt")
    assert shop.versions() == "2.0 1.0"
    second = shop.environments()
    assert len(second) == 1
    assert second != first


def test_an_update_that_fails_leaves_the_one_before_in_use(shop: Shop, tree: Tree) -> None:
    assert shop.versions() == "1.0 1.0"
    before, there = shop.current(), shop.environments()
    good_lock = (tree.lock_folder / "requirements.txt").read_text()
    verify = tree.root / "assets" / "launcher" / "verify.py"
    verify.write_text("raise SystemExit('torch computes wrong numbers on this processor')")

    shop.offer("small", "2.0", "requirements.txt")
    failed = tree.run("python", "-c", "pass")
    assert failed.returncode == 1
    assert "wrong numbers" in failed.stderr
    assert shop.current() == before
    shop.write("requirements.txt", good_lock)
    assert shop.versions() == "1.0 1.0"

    command = tree.command("python", "-c", "print('still here')")
    command.insert(2, "--reinstall")
    kept = tree.run_command(command)
    assert kept.stdout == "still here\n"
    assert "Going on with what was there before." in kept.stderr
    assert set(there) <= set(shop.environments())


def test_kill_9_while_torch_comes_and_again_while_it_is_unpacked(shop: Shop, tree: Tree) -> None:
    shop.index.block_pause_s = 0.02
    part = tree.places.wheels / f"{TORCH}.part"
    first = tree.start("python", "-c", "pass")
    wait_until(lambda: part.exists() and part.stat().st_size > TORCH_BYTES // 3, "a third of it")
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = part.stat().st_size
    assert not tree.places.current.exists()

    shop.index.block_pause_s = 0.0
    second = tree.start("python", "-c", "pass")
    log = tree.places.launcher_log
    wait_until(lambda: "* Installing torch" in log.read_text(), "unpacking")
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert f"bytes={kept}-" in shop.index.ranges

    assert shop.versions() == "1.0 1.0"
    assert shop.index.sent[TORCH] <= TORCH_BYTES + IN_FLIGHT_BYTES


def test_a_package_that_is_not_the_locked_one_is_refused(shop: Shop, tree: Tree) -> None:
    shop.write("requirements.txt", f"small==1.0 --hash=sha256:{'0' * 64}\n")
    done = tree.run("python", "-c", "pass")
    assert done.returncode == 1
    assert "was refused" in done.stderr
    assert not tree.places.current.exists()


def test_a_torch_that_is_not_what_the_index_says_is_refused(shop: Shop, tree: Tree) -> None:
    shop.index.lies[TORCH] = hashlib.sha256(b"another file").hexdigest()
    done = tree.run("python", "-c", "pass")
    assert done.returncode == 1
    assert "was refused: its sha256" in done.stderr


def test_an_unreachable_index_is_told_as_that(shop: Shop, tree: Tree) -> None:
    shop.index.close()
    tree.environ["PIP_RETRIES"] = "1"
    done = tree.run("chat", "--json", "default", "hello")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "NetworkFault"
    assert "cannot be reached" in error["message"]


def lower_the_limit(tree: Tree) -> None:
    """So that the test's torch is a large download."""
    limit = tree.root / "assets" / "launcher" / "torch_build.py"
    limit.write_text(limit.read_text().replace("1_000_000_000", "1_000_000"))


def test_a_gigabyte_needs_a_yes(shop: Shop, tree: Tree) -> None:
    lower_the_limit(tree)
    done = tree.run("python", "-c", "pass")
    assert done.returncode == 1
    assert "is a download of 0.0 GB in 1 files" in done.stderr
    assert "--yes" in done.stderr
    assert TORCH not in shop.index.sent


def test_with_a_yes_it_comes_and_installing_says_nothing_on_stdout(shop: Shop, tree: Tree) -> None:
    lower_the_limit(tree)
    command = tree.command("chat", "--json", "default", "hello")
    command.insert(2, "--yes")
    done = tree.run_command(command)
    assert json.loads(done.stdout)["arguments"] == ["chat", "--json", "default", "hello"]
    assert "Installing packages" in done.stderr

    # The test tools come once, into the same environment.
    checks = tree.root / "assets" / "launcher" / "checks.py"
    checks.write_text("import probing, sys; print(probing.version, sys.argv[1:])")
    assert tree.run("test", "-k", "x").stdout == "1.0 ['-k', 'x']\n"
    asked = len(shop.index.ranges)
    assert tree.run("test").stdout == "1.0 []\n"
    assert len(shop.index.ranges) == asked


def test_two_installers_make_one_environment(shop: Shop, tree: Tree) -> None:
    both = [tree.start("python", "-c", "import torch; print('done')") for _ in range(2)]
    outputs = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert all(output.endswith("done\n") for output in outputs)
    assert sum("Another PreScope is installing" in output for output in outputs) == 1
    assert len(shop.environments()) == 1
