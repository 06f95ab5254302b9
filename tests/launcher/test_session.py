"""One PreScope at a time, and nothing of it left afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.request

import pytest

from tests.launcher.tree import Tree, is_alive, wait_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and links")


@pytest.fixture(autouse=True)
def installed(tree: Tree) -> None:
    tree.pretend_installed()


def finish(launcher: subprocess.Popen[str]) -> str:
    """Its console, once it has ended by itself."""
    output, _ = launcher.communicate(timeout=20)
    return output


def test_a_start_ends_at_the_app_and_ctrl_c_ends_both(tree: Tree) -> None:
    launcher = tree.start()
    app = tree.wait_for_app()
    with urllib.request.urlopen(f"http://127.0.0.1:{app['port']}/healthz") as answer:
        assert answer.status == 200
    wait_until(lambda: "[timing]" in tree.places.launcher_log.read_text(), "the timing line")
    launcher.send_signal(signal.SIGINT)
    output = finish(launcher)
    assert f"PreScope is at http://127.0.0.1:{app['port']}/?t=t0ken" in output
    assert "t0ken" not in tree.places.launcher_log.read_text()
    assert launcher.returncode == 0
    assert not is_alive(app["pid"])
    assert not is_alive(app["engine"])
    assert not tree.places.app_file.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_the_launcher_ends_the_app_ends_too(tree: Tree, number: signal.Signals) -> None:
    launcher = tree.start()
    app = tree.wait_for_app()
    launcher.send_signal(number)
    launcher.wait(20)
    for pid in (app["pid"], app["engine"]):
        wait_until(lambda pid=pid: not is_alive(pid), f"process {pid} to go")


def test_an_app_that_will_not_leave_is_made_to(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = tree.root / "assets" / "launcher" / "app_process.py"
    text = quick.read_text().replace("LEAVES_WITHIN_S = 8.0", "LEAVES_WITHIN_S = 0.3")
    quick.write_text(text.replace("TERMINATES_WITHIN_S = 3.0", "TERMINATES_WITHIN_S = 0.3"))
    tree.environ["FAKE_APP"] = "deaf"
    launcher = tree.start()
    app = tree.wait_for_app()
    launcher.send_signal(signal.SIGTERM)
    finish(launcher)
    assert not is_alive(app["pid"])
    assert not is_alive(app["engine"])


def test_a_second_start_shows_the_first(tree: Tree) -> None:
    tree.start()
    app = tree.wait_for_app()
    second = tree.run()
    assert second.returncode == 0
    assert second.stdout == (
        f"PreScope is already running: http://127.0.0.1:{app['port']}/?t=t0ken\n"
    )
    assert tree.app_starts() == [app["pid"]]


@pytest.mark.parametrize("attempt", range(3))
def test_two_starts_at_once_make_one_app(tree: Tree, attempt: int) -> None:
    both = [tree.start(), tree.start()]
    app = tree.wait_for_app()
    wait_until(lambda: any(one.poll() is not None for one in both), "the second to leave")
    left, stayed = sorted(both, key=lambda one: one.poll() is None)
    assert left.returncode == 0
    assert "already running: http://127.0.0.1:" in finish(left)
    assert stayed.poll() is None
    assert tree.app_starts() == [app["pid"]]


def test_what_a_killed_start_left_behind_is_not_believed(tree: Tree) -> None:
    """The port of the dead app answers, but for a stranger; its pid is somebody else's now."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        record = {"port": stranger.getsockname()[1], "token": "old", "pid": os.getpid()}
        stranger.close()
        tree.places.app_file.write_text(json.dumps(record))
        launcher = tree.start()
        wait_until(lambda: len(tree.app_starts()) == 1, "a new app")
        app_pid = tree.app_starts()[0]
        wait_until(lambda: str(app_pid) in read(tree), "the new record")
    launcher.send_signal(signal.SIGTERM)
    assert "t=old" not in finish(launcher)


def read(tree: Tree) -> str:
    file = tree.places.app_file
    return file.read_text() if file.exists() else ""


def test_a_taken_port_is_passed_over_and_the_true_one_told(tree: Tree) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wished = taken.getsockname()[1]
        launcher = tree.start("--port", str(wished))
        app = tree.wait_for_app()
        assert app["port"] != wished
        wait_until(lambda: "[timing]" in tree.places.launcher_log.read_text(), "the timing line")
        launcher.send_signal(signal.SIGTERM)
        output = finish(launcher)
    assert f"Port {wished} is taken; using {app['port']}." in output


def test_a_free_port_is_used(tree: Tree) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        wished = probe.getsockname()[1]
    tree.start("--port", str(wished))
    assert tree.wait_for_app()["port"] == wished


def test_an_app_that_cannot_start_is_told_with_its_own_words(tree: Tree) -> None:
    tree.environ["FAKE_APP"] = "crash"
    done = tree.run()
    assert done.returncode == 1
    assert "the fake app cannot start" in done.stdout
    assert str(tree.places.app_log) in done.stdout


def test_an_app_that_dies_later_is_told_too(tree: Tree) -> None:
    launcher = tree.start()
    app = tree.wait_for_app()
    wait_until(lambda: "[timing]" in tree.places.launcher_log.read_text(), "the timing line")
    os.kill(app["pid"], signal.SIGKILL)
    assert "stopped by itself (exit status -9)" in finish(launcher)
    assert launcher.returncode == 1
