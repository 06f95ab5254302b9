from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from assets.launcher import checks
from assets.launcher.checks import CHECKS
from assets.launcher.cli import OWN_COMMANDS, RUNTIME_COMMANDS, split
from assets.launcher.places import ROOT
from tests.launcher.tree import Tree


@pytest.mark.parametrize(
    ("version", "words"),
    [((2, 7, 18), "too old"), ((3, 9, 18), "too old"), ((3, 15, 0), "not been made to work")],
)
def test_a_python_that_will_not_do_is_refused_by_name(version: tuple[int, ...], words: str) -> None:
    reason = launcher.objection(version, "cpython", 64, False)
    assert words in reason
    assert ".".join(map(str, version)) in reason


@pytest.mark.parametrize("minor", [10, 11, 12, 13, 14])
def test_supported_pythons_are_accepted(minor: int) -> None:
    assert launcher.objection((3, minor, 1), "cpython", 64, False) is None
    assert "32-bit" in launcher.objection((3, minor, 1), "cpython", 32, False)
    assert "free-threaded" in launcher.objection((3, minor, 1), "cpython", 64, True)
    assert "pypy" in launcher.objection((3, minor, 1), "pypy", 64, False)


def test_old_pythons_can_read_launcher_py_far_enough_to_refuse() -> None:
    ast.parse((ROOT / "launcher.py").read_text(encoding="utf-8"), feature_version=(3, 4))


@pytest.mark.parametrize("name", ["python2.7", "python3.6", "python3.9"])
def test_real_old_pythons_refuse_politely(name: str) -> None:
    python = shutil.which(name)
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"{name} is not here")
    done = subprocess.run([python, str(ROOT / "launcher.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "PreScope needs Python 3.10" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_launcher_needs_only_the_standard_library() -> None:
    program = "import sys; import assets.launcher.session, assets.launcher.cli\nprint(*sys.modules)"
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    foreign = {n for n in loaded - sys.stdlib_module_names if not n.startswith(("_", "assets"))}
    assert foreign == set()


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in (*OWN_COMMANDS, *RUNTIME_COMMANDS):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ([], None, [])),
        (["--port", "80", "chat", "--json", "m"], (["--port", "80"], "chat", ["--json", "m"])),
        (["python", "-c", "pass"], ([], "python", ["-c", "pass"])),
        (["--yes", "test", "--data-dir", "x"], (["--yes"], "test", ["--data-dir", "x"])),
    ],
)
def test_what_follows_a_command_is_the_commands(
    arguments: list[str], expected: tuple[list[str], str | None, list[str]]
) -> None:
    assert split(arguments) == expected


def test_an_unknown_command_is_refused(tree: Tree) -> None:
    done = tree.run("dance")
    assert done.returncode == 2
    assert "no command 'dance'" in done.stderr
    assert not tree.places.data.exists()


def test_runtime_commands_pass_through_untouched(tree: Tree, tmp_path: Path) -> None:
    """Even where the person's own folder has something of the same name."""
    tree.pretend_installed()
    if sys.version_info >= (3, 11):
        (tmp_path / "runtime.py").write_text("raise SystemExit('somebody else')")
    done = tree.run("chat", "--json", "default", "a prompt", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "arguments": ["chat", "--json", "default", "a prompt"],
        "cwd": str(tmp_path),
        "data": str(tree.places.data),
    }
    assert tree.run("doctor", "fail", cwd=tmp_path).returncode == 7


def test_python_is_the_environments_own(tree: Tree) -> None:
    ready = tree.pretend_installed()
    done = tree.run("python", "-c", "import sys; print(sys.executable); sys.exit(3)")
    assert (done.stdout.strip(), done.returncode) == (str(ready.python), 3)


def test_with_json_even_a_failure_is_one_object_on_stdout(tree: Tree) -> None:
    tree.places.data.write_text("a file where the folder should be")
    done = tree.run("probe", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "FolderFault"
    assert str(tree.places.data) in error["message"]
    assert "--data-dir" in error["next_step"]


def test_the_checks_are_the_promised_ones() -> None:
    assert [" ".join(check) for check in CHECKS] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
    ]


def test_every_check_runs_and_pytest_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def run(*check: str) -> int:
        asked.append(check)
        return int(check == ("mypy",))

    monkeypatch.setattr(checks, "run", run)
    assert checks.main([]) == 1, "mypy failed, though pytest did not"
    assert tuple(asked[:-1]) == CHECKS
    assert asked[-1][0] == "pytest"
    asked.clear()
    assert checks.main(["tests/test_x.py", "-k", "y"]) == 0
    assert asked == [("pytest", "tests/test_x.py", "-k", "y")]


def test_as_many_processes_as_have_cores_and_memory() -> None:
    gib = 2**30
    assert checks.workers(2, 20 * gib) == 2
    assert checks.workers(2, 5 * gib) == 1
    assert checks.workers(1, gib) == 1
    assert checks.workers(64, 256 * gib) == checks.MOST_WORKERS
    assert checks.spread(1) == []
    assert checks.spread(2)[:2] == ["-n", "2"]


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_ci_runs_the_launcher_and_nothing_else() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.rstrip().endswith("python3 launcher.py test")
