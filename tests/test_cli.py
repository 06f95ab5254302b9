"""The command line keeps its contract: one JSON object, errors with a next step, exact figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import config
from runtime.__main__ import build_parser, main
from runtime.bench import SUITES
from runtime.commands import COMMANDS, doctor
from runtime.core import EmulatedMachine, GenerationStats, HardwareProfile
from runtime.errors import ConfigError, ModelFilesError
from runtime.machines import MACHINES
from runtime.profiles_file import keep_profile

ROOT = Path(__file__).resolve().parent.parent
STATS = (
    "emulated device policy prompt_tokens new_tokens ttft_s decode_tokens_per_s hit_rate routed "
    "served_resident served_prefetch_in_time served_prefetch_late served_on_demand served_cpu "
    "link_bytes_on_demand link_bytes_prefetch_used link_bytes_prefetch_wasted link_bytes_per_s "
    "stall_s predictor_s predictor_recall predictor_precision vram_used_bytes ram_used_bytes "
    "cache_slots cache_slots_used disk_bytes disk_stall_s ram_hit_rate ram_experts"
).split()


@pytest.fixture(autouse=True)
def data_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one chat teaches the predictor must not show in the figures of the next."""
    monkeypatch.setenv(config.DATA_DIR_VARIABLE, str(tmp_path / "data"))


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
    assert (status, result["fits"]) == (0, True)
    assert plan["slots"] == result["experts"] // 2
    assert plan["used_bytes"] <= plan["budget_bytes"]
    parts = ("dense", "predictor", "kv", "workspace", "reserve", "slots")
    assert plan["used_bytes"] == sum(plan[f"{part}_bytes"] for part in parts)
    on_card = sum(row["bytes"] for row in result["where"] if row["place"] == "card")
    assert on_card == plan["budget_bytes"]
    assert "modelled, not measured" in result["speed"]["origin"]


QWEN = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with nothing but a config.json in them."""
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    found = {}
    for name, quantisation in (("bf16", None), ("fp8", fp8), ("awq", awq)):
        found[name] = tmp_path_factory.mktemp(name)
        config = QWEN | ({"quantization_config": quantisation} if quantisation else {})
        (found[name] / "config.json").write_text(json.dumps(config))
    return found


def test_plan_needs_only_a_config_and_a_stated_machine(
    configs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    stated = ["--profile", "rtx4090", "--ram", "64GiB"]
    status, result = answer(capfd, "plan", str(configs["bf16"] / "config.json"), *stated)
    assert (status, result["fits"], result["emulated"]) == (0, True, False)
    assert (result["machine"], result["read"]) == ("stated", "config.json alone")
    assert result["shape"]["expert_bytes"] == 3 * 2048 * 768 * 2
    assert result["shape"]["kv_bytes_per_token"] == 48 * 4 * 128 * 2 * 2
    assert result["shape"]["predictor_bytes"] == 48 * 128 * 2048 * 2 * 2
    assert result["plan"]["ram_experts"] is None
    assert 1000 < result["plan"]["slots"] < 2300
    speed = result["speed"]
    assert speed["routing"] == "Qwen3-30B-A3B"
    assert 20 < speed["low_tokens_per_s"] < speed["tokens_per_s"] < speed["high_tokens_per_s"] < 120


@pytest.mark.parametrize(("name", "bits"), [("fp8", 8), ("awq", 4.5)])
def test_plan_knows_what_quantised_experts_weigh(
    name: str, bits: float, configs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    _, result = answer(capfd, "plan", str(configs[name]), "--profile", "rtx4090")
    assert result["shape"]["expert_bytes"] == pytest.approx(3 * 2048 * 768 * bits / 8, rel=0.001)
    assert result["expert_form"] == name


@pytest.mark.parametrize("wish", ["int8", "int4"])
def test_a_config_alone_foretells_what_quantising_comes_to(wish: str, tmp_path: Path) -> None:
    """The same sizes as with the weights at hand, which are quantised while loading."""
    from runtime.config import DEFAULT_MODEL_DIR
    from runtime.loader_shape import foresee_shape

    (tmp_path / "config.json").write_bytes((DEFAULT_MODEL_DIR / "config.json").read_bytes())
    with_files = foresee_shape(DEFAULT_MODEL_DIR, None, wish)  # type: ignore[arg-type]
    alone = foresee_shape(tmp_path, None, wish)  # type: ignore[arg-type]
    assert (with_files.from_files, alone.from_files) == (True, False)
    assert alone.form == wish
    # How files are read is not foretold without them.
    assert replace(alone.shape, name="") == replace(with_files.shape, name="", reading_bytes=0)
    assert alone.shape.expert_bytes < foresee_shape(tmp_path).shape.expert_bytes


def test_plan_says_what_a_person_gets(
    configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--profile", "laptop12", "--ram", "32GiB", "--link", "pcie3x4"]
    assert main(["plan", str(configs["bf16"]), *small]) == 0
    out = capsys.readouterr().out
    assert "read from the disk whenever it is needed" in out
    assert "tokens/s" in out
    assert "modelled, not measured" in out


def test_a_model_that_does_not_fit_is_an_answer_with_a_next_step(
    configs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_card = ["--profile", "laptop12", "--vram", "3GiB"]
    status, result = answer(capfd, "plan", str(configs["bf16"]), *tiny_card)
    assert (status, result["fits"]) == (0, False)
    assert "3.00 GiB" in result["why"]
    assert "more" in result["next_step"]
    assert "speed" not in result
    assert main(["plan", "default", "--vram", "10"]) == 0
    assert "It does not fit" in capfd.readouterr().out


def test_a_card_nobody_measured_is_left_alone_beside_an_engine(
    configs: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    present, probed = [True], []

    def probe(emulated: EmulatedMachine | None) -> HardwareProfile:
        probed.append(emulated)
        return replace(MACHINES["rtx4090"].profile(), device_kind="cuda")

    monkeypatch.setattr("runtime.hardware.card_present", lambda: present[0])
    monkeypatch.setattr("runtime.hardware.probe", probe)
    asked = ["plan", str(configs["bf16"]), "--data-dir", str(tmp_path)]
    assert answer(capfd, *asked, "--unloaded") == (0, {"unmeasured": True})
    assert main([*asked, "--unloaded"]) == 0
    assert "load a model first" in capfd.readouterr().out
    assert "fits" in answer(capfd, *asked, "--unloaded", "--profile", "rtx4090")[1]
    assert not probed
    assert "fits" in answer(capfd, *asked)[1], "without --unloaded it is measured"
    assert len(probed) == 1
    present[0] = False
    assert "fits" in answer(capfd, *asked, "--unloaded")[1]
    assert len(probed) == 2
    present[0] = True
    keep_profile(probe(None), tmp_path)
    assert "fits" in answer(capfd, *asked, "--unloaded")[1]
    assert len(probed) == 3


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
        (["chat", "default", "x", "--vram", "10"], "MemoryPlanError", ""),
        (["plan", "default", "--profile", "voodoo2"], "ConfigError", "rtx4090"),
        (["plan", "default", "--profile", "laptop12", "--link", "pcie5x16"], "ConfigError", "pcie"),
        (["plan", "default", "--profile", "rtx4090", "--cpu", "z80"], "ConfigError", "cpu55"),
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


def test_experts_get_every_core_unless_the_environment_asks_for_less() -> None:
    assert config.cpu_threads(8, {}) == 8
    assert config.cpu_threads(8, {"OMP_NUM_THREADS": "2"}) == 2
    assert config.cpu_threads(8, {"OMP_NUM_THREADS": "64"}) == 8
    assert config.cpu_threads(8, {"OMP_NUM_THREADS": "0"}) == 1
    assert config.cpu_threads(8, {"OMP_NUM_THREADS": "4,2"}) == 8


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
