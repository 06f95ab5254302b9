from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from assets.launcher import environment
from assets.launcher.children import Children, clean_environ
from assets.launcher.environment import Environment
from assets.launcher.faults import NetworkFault, Stopped, explained
from assets.launcher.install import package_in
from assets.launcher.places import ROOT, Places
from tests.launcher.tree import is_alive, wait_until


def test_what_misleads_is_dropped_and_what_reaches_the_index_is_kept(tmp_path: Path) -> None:
    dropped = {
        name: "x"
        for name in (
            *("PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONOPTIMIZE"),
            *("PIP_TARGET", "PIP_USER", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PIP_CONSTRAINT"),
            *("VIRTUAL_ENV", "CONDA_PREFIX", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "Pythonpath"),
        )
    }
    kept = {
        name: "x"
        for name in (
            *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE", "PIP_FIND_LINKS"),
            *(
                "PIP_CERT",
                "SSL_CERT_FILE",
                "HTTPS_PROXY",
                "PATH",
                "HF_TOKEN",
                "CUDA_VISIBLE_DEVICES",
            ),
        )
    }
    clean = clean_environ({**dropped, **kept}, tmp_path)
    assert not set(dropped) & set(clean)
    assert kept.items() <= clean.items()
    assert clean["PYTHONNOUSERSITE"] == clean["PYTHONUTF8"] == clean["PIP_NO_INPUT"] == "1"
    assert clean["PRESCOPE_DATA_DIR"] == str(tmp_path)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    made = Places(tmp_path / "data")
    made.prepare()
    return made


@pytest.fixture
def lock_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "lock"
    folder.mkdir()
    for name in environment.LOCK_FILES:
        (folder / name).write_text(name)
    return folder


def put_to_use(places: Places, key: str, wanted: str) -> Environment:
    made = environment.environment_for(places, key)
    made.python.parent.mkdir(parents=True)
    made.python.write_text("")
    environment.switch(places, {"key": key, "wanted": wanted, "generation": 0})
    return made


def test_the_environment_follows_the_lock_and_the_wish(
    places: Places, lock_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRESCOPE_TORCH", raising=False)
    assert environment.current(places, lock_folder) is None
    made = put_to_use(places, environment.wanted_key("cpu", lock_folder), "cpu")
    assert environment.current(places, lock_folder) == made

    monkeypatch.setenv("PRESCOPE_TORCH", "cu130")
    assert environment.current(places, lock_folder) is None
    monkeypatch.setenv("PRESCOPE_TORCH", "cpu")
    assert environment.current(places, lock_folder) == made

    (lock_folder / "requirements.txt").write_text("something newer")
    assert environment.current(places, lock_folder) is None


def test_a_stale_environment_is_made_anew_beside_and_would_still_do(
    places: Places, lock_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRESCOPE_TORCH", raising=False)
    made = put_to_use(places, environment.wanted_key("cpu", lock_folder), "cpu")
    environment.mark_stale(places)
    assert environment.current(places, lock_folder) is None
    assert environment.current(places, lock_folder, even_if_stale=True) == made
    again = environment.next_generation(places)
    key = environment.wanted_key("cpu", lock_folder, again)
    assert environment.environment_for(places, key) != made
    environment.switch(places, {"key": key, "wanted": "cpu", "generation": again})
    assert environment.next_generation(places) == again


@pytest.mark.parametrize("record", ["", "null", '{"key": 1}', '{"key": "k", "wanted": 3}'])
def test_a_damaged_pointer_means_installing_again(
    record: str, places: Places, lock_folder: Path
) -> None:
    places.current.write_text(record)
    assert environment.current(places, lock_folder) is None


def test_an_environment_in_use_is_not_removed(places: Places) -> None:
    old, busy, new = (Environment(places.data / f"env-{n}") for n in ("old", "busy", "new"))
    for one in (old, busy, new):
        one.folder.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from assets.launcher.instance import FileLock\n"
            "lock = FileLock(Path(sys.argv[1])); lock.acquire(shared=True)\n"
            "print(flush=True); input()",
            str(busy.in_use().path),
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        said: list[str] = []
        environment.remove_others(places, new, said.append)
        assert [one.folder.exists() for one in (old, busy, new)] == [False, True, True]
        assert said == ["env-busy is still in use; it will be removed later."]
        holder.stdin.write("\n")
    environment.remove_others(places, new, said.append)
    assert not busy.folder.exists()


def test_a_leashed_child_ends_with_whoever_holds_the_leash(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    )
    program = (
        "import os, sys; from assets.launcher.children import Children\n"
        "Children().run(sys.executable, 'sleeper', [], os.environ, lambda l: print(l, flush=True))"
    )
    environ = {**clean_environ({}), "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    holder = subprocess.Popen(
        [sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        assert is_alive(pid)
        holder.kill()
    wait_until(lambda: not is_alive(pid), "the child to notice", within_s=5)


def test_stopping_ends_the_child_and_refuses_the_next(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    environ = {**clean_environ({}), "PYTHONPATH": str(tmp_path)}
    children = Children()
    with pytest.raises(Stopped):
        children.run(sys.executable, "sleeper", [], environ, lambda _: children.stop_all())
    with pytest.raises(Stopped):
        children.run(sys.executable, "sleeper", [], environ, lambda _: None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("SSLError: CERTIFICATE_VERIFY_FAILED self-signed certificate", "not trusted"),
        (
            "NewConnectionError: [Errno -3] Temporary failure in name resolution",
            "cannot be reached",
        ),
        ("ReadTimeoutError: Read timed out.", "cannot be reached"),
        ("Tunnel connection failed: 407 Proxy Authentication Required", "user name"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "refused"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build"),
        ("PermissionError: [WinError 5] Access is denied", "cannot be written"),
        ("SomethingElse: 42", "SomethingElse: 42"),
    ],
)
def test_what_pip_says_becomes_what_a_person_can_do(line: str, words: str) -> None:
    fault = explained("Installing requirements.txt", ["Collecting x", line])
    assert words in str(fault)
    assert fault.next_step


def test_an_unreachable_index_is_not_mistaken_for_a_missing_wheel() -> None:
    lines = [
        "WARNING: Retrying after connection broken by 'NameResolutionError(...)'",
        "ERROR: No matching distribution found for torch==2.13.0",
    ]
    assert isinstance(explained("Looking for torch", lines), NetworkFault)


def test_the_pointer_is_readable_json(places: Places) -> None:
    environment.switch(places, {"key": "k", "wanted": "cpu", "torch": "2.13.0"})
    record = json.loads(places.current.read_text())
    assert record == {"schema": 1, "key": "k", "wanted": "cpu", "torch": "2.13.0"}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Collecting gradio==6.31.0 (from -r requirements.txt (line 3))", "gradio"),
        ("Processing /wheels/pydantic_core-2.50.4-cp311-cp311-linux.whl (from x)", "pydantic_core"),
        ("Processing c:\\wheels\\pandas-3.1.1-cp311.whl", "pandas"),
        ("Ignoring typer: markers 'python_version < \"3.11\"' don't match", "typer"),
    ],
)
def test_progress_names_the_package(line: str, name: str) -> None:
    assert package_in(line) == name
