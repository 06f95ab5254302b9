"""The command line keeps its contract: one JSON object, errors with a next step, exact figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime import config
from runtime.__main__ import build_parser, main
from runtime.bench import SUITES
from runtime.commands import COMMANDS, doctor
from runtime.core import GenerationStats
from runtime.errors import ConfigError, ModelFilesError

ROOT = Path(__file__).resolve().parent.parent
STATS = (
    "emulated device policy prompt_tokens new_tokens ttft_s decode_tokens_per_s hit_rate routed "
    "served_resident served_prefetch_in_time served_prefetch_late served_on_demand served_cpu "
    "link_bytes_on_demand link_bytes_prefetch_used link_bytes_prefetch_wasted link_bytes_per_s "
    "stall_s predictor_s predictor_recall predictor_precision vram_used_bytes ram_used_bytes "
    "cache_slots cache_slots_used"
).split()


def answer(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Run a command with --json in this process; its standard output must be one object."""
    status = main([*arguments, "--json"])
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    return status, json.loads(out)


def test_chat_prints_one_object_whatever_libraries_print() -> None:
    noisy = (
        "import os, sys, runtime.loader as l, runtime.__main__ as m\n"
        "real = l.load_model\n"
        "def loud(*a, **k):\n"
        "    print('stray'); os.write(1, b'stray'); os.system('echo stray')\n"
        "    return real(*a, **k)\n"
        "l.load_model = loud\n"
        "sys.exit(m.main(sys.argv[1:]))\n"
    )
    command = ["chat", "default", "Hello", "--json", "--virtual-clock", "--max-new-tokens", "6"]
    ran = subprocess.run(
        [sys.executable, "-c", noisy, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("stray") == 3
    result = json.loads(ran.stdout)
    assert len(result["token_ids"]) == result["stats"]["new_tokens"] <= 6
    assert result["text"]


def test_chat_gives_the_same_again_and_its_figures_close(
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = ["chat", "default", "What is 2 + 2?", "--virtual-clock"]
    sampled = [*arguments, "--temperature", "1", "--seed", "7", "--max-new-tokens", "8"]
    first, again = answer(capfd, *sampled), answer(capfd, *sampled)
    assert first == again or first[1]["token_ids"] == again[1]["token_ids"]
    for policy in ("on-demand", "cpu-miss"):
        options = ["--policy", policy, "--cache-fraction", "0.1", "--max-new-tokens", "8"]
        status, result = answer(capfd, *arguments, *options)
        stats = result["stats"]
        assert status == 0
        assert list(stats) == STATS
        assert stats["policy"] == policy
        assert stats["emulated"]
        assert sum(stats[name] for name in STATS if name.startswith("served_")) == stats["routed"]
        assert stats["cache_slots_used"] <= stats["cache_slots"] == 19


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8e9", 8e9), ("8GiB", 8 * 2**30), ("24 gb", 24e9), ("1.5MiB", 1.5 * 2**20), ("4096", 4096)],
)
def test_sizes_are_understood_as_people_write_them(text: str, size_bytes: float) -> None:
    options = build_parser().parse_args(["plan", "default", "--ram", text, "--vram", text])
    assert options.ram == options.vram == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 apples", "1.2.3", "0", "0.5", "1e400"])
def test_sizes_that_make_no_sense_are_a_wrong_usage(
    text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, result = answer(capfd, "plan", "default", f"--ram={text}")
    assert status == 2
    assert "--ram" in result["error"]["message"]


def test_the_statistics_are_those_of_the_contract() -> None:
    assert list(GenerationStats.__dataclass_fields__) == STATS


def test_plan_counts_every_byte(capfd: pytest.CaptureFixture[str]) -> None:
    status, result = answer(capfd, "plan", "default", "--cache-fraction", "0.5")
    plan = result["plan"]
    assert status == 0
    assert plan["slots"] == result["experts"] // 2
    assert plan["used_bytes"] <= plan["budget_bytes"]
    parts = ("dense", "kv", "workspace", "reserve", "slots")
    assert plan["used_bytes"] == sum(plan[f"{part}_bytes"] for part in parts)


def test_a_link_rate_replaces_the_probed_one(capfd: pytest.CaptureFixture[str]) -> None:
    _, result = answer(capfd, "probe", "--link-bytes-per-s", "12345")
    assert result["link_bytes_per_s"]["value"] == 12345


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["bench", "nope"], "ConfigError", "overhead"),
        (["chat", "no such model", "x"], "ConfigError", "folder"),
        (["chat", "owner/absent", "x"], "ModelFilesError", "Download"),
        (["chat", "default", "x", "--max-new-tokens", "2", "--top-p", "7"], "RequestError", ""),
        (["plan", "default", "--vram", "10"], "MemoryPlanError", ""),
    ],
)
def test_a_failure_is_an_object_with_a_next_step(
    arguments: list[str], kind: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, result = answer(capfd, *arguments)
    assert status == 1
    assert list(result) == ["error"]
    assert list(result["error"]) == ["type", "message", "next_step"]
    assert result["error"]["type"] == kind
    assert words in result["error"]["next_step"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sing"],
        [],
        ["chat"],
        ["plan", "default", "--cache-fraction", "1.5"],
        ["plan", "default", "--vram", "0.5"],
        ["chat", "default", "x", "--policy", "magic"],
    ],
)
def test_a_wrong_usage_is_an_object_too(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    status, result = answer(capfd, *arguments)
    assert status == 2
    assert "--help" in result["error"]["next_step"]


def test_without_json_errors_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nope"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "Choose one of" in err


def test_suites_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert answer(capfd, "bench") == (0, {"suites": SUITES})
    assert main(["bench"]) == 0
    assert "overhead" in capfd.readouterr().out


def test_an_unexpected_failure_is_json_as_well(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.commands.bench.run", lambda options, say: 1 / 0)
    status, result = answer(capfd, "bench")
    assert status == 1
    assert "ZeroDivisionError" in result["error"]["message"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    text = capsys.readouterr().out
    for option in ("--json", "--policy", "--vram", "--seed", "--virtual-clock", "--data-dir"):
        assert option in text


def test_help_needs_no_torch() -> None:
    script = (
        "import sys, runtime.__main__ as m\n"
        "m.main(['bench', '--json'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


# doctor


def test_doctor_finds_nothing_wrong_here(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, result = answer(capfd, "doctor", "--data-dir", str(tmp_path / "new" / "data"))
    assert (status, result["ok"]) == (0, True)
    assert len(result["checks"]) == 6
    main(["doctor", "--data-dir", str(tmp_path)])
    assert capfd.readouterr().out.count("ok  ") == 6


def test_doctor_notices_a_damaged_model(tmp_path: Path) -> None:
    assert "missing" in doctor.default_model(tmp_path).detail
    for name in doctor.NEEDED_FILES:
        (tmp_path / name).write_bytes(b"x")
    assert "cannot be checked" in doctor.default_model(tmp_path).detail
    (tmp_path / "report.json").write_text('{"weights": {"sha256": "0"}}')
    broken = doctor.default_model(tmp_path)
    assert "not 0" in broken.detail
    assert broken.next_step


def test_doctor_notices_a_folder_it_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check = doctor.data_folder(tmp_path / "file" / "data")
    assert not check.ok
    assert "--data-dir" in check.next_step


def test_a_failed_check_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = doctor.Check("x", False, "broken", "mend it")
    monkeypatch.setattr("runtime.commands.doctor._checks", lambda options: [bad])
    status, result = answer(capfd, "doctor")
    assert (status, result["ok"]) == (1, False)
    main(["doctor"])
    assert "mend it" in capfd.readouterr().out


# config


def test_the_data_folder_is_the_one_given(tmp_path: Path) -> None:
    variable = {config.DATA_DIR_VARIABLE: str(tmp_path / "v")}
    assert config.data_dir(str(tmp_path), variable) == tmp_path
    assert config.data_dir(None, variable) == tmp_path / "v"
    assert config.data_dir(None, {}).name.lower() == "prescope"


def test_models_are_found_by_name_folder_and_hub_name(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    repository = tmp_path / "models--owner--name"
    old, new = (repository / "snapshots" / (c * 40) for c in "ab")
    for age, folder in enumerate((old, new)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        os.utime(folder, (age, age))
    assert config.model_folder("default", environ) == config.DEFAULT_MODEL_DIR
    assert config.model_folder(str(tmp_path), environ) == tmp_path.resolve()
    assert config.model_folder("owner/name", environ) == new
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert config.model_folder("owner/name", environ) == old
    (repository / "refs" / "main").write_text("../../../etc")
    assert config.model_folder("owner/name", environ) == new
    assert config.model_name(old) == "owner/name"
    assert config.model_name(tmp_path) == tmp_path.name
    with pytest.raises(ModelFilesError, match="absent"):
        config.model_folder("owner/absent", environ)


@pytest.mark.parametrize("name", ["", "../x", "a/b/c", "owner/..", "/no/such/folder", "a\x00b"])
def test_names_that_are_no_models_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ModelFilesError)):
        config.model_folder(name, {"HF_HUB_CACHE": str(tmp_path)})
