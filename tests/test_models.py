"""What the dropdown offers, from folders that nobody vouches for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.models import (
    DEFAULT,
    DEFAULT_LABEL,
    MAX_CONFIG_BYTES,
    ModelOffer,
    ModelShelf,
    cache_folder,
    inspect_folder,
)
from app.settings import SettingsStore
from tests.gguf_writer import gguf_bytes

MIXTURE = {"model_type": "qwen3_moe", "num_experts": 128}
REVISION = "0123456789abcdef0123456789abcdef01234567"


def model(folder: Path, config: Any = MIXTURE, weights: int = 100) -> Path:
    folder.mkdir(parents=True)
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(content)
    if weights:
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"\0" * weights)
        (folder / "model-00002-of-00002.safetensors").write_bytes(b"\0" * weights)
    return folder


def shelf(tmp_path: Path, *folders: Path) -> list[ModelOffer]:
    store = SettingsStore(tmp_path / "data")
    store.update(model_folders=[str(folder) for folder in folders])
    return ModelShelf(store, environ={"HF_HUB_CACHE": str(tmp_path / "cache")})()


def test_the_built_in_model_is_always_first(tmp_path: Path) -> None:
    (only,) = shelf(tmp_path)
    assert (only.label, only.path, only.supported) == (DEFAULT_LABEL, DEFAULT, True)


def test_the_built_in_model_shows_its_size(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", MIXTURE, 7)
    (offer,) = ModelShelf(
        SettingsStore(tmp_path), default_folder=folder, environ={"HF_HUB_CACHE": str(tmp_path)}
    )()
    assert (offer.path, offer.size_bytes, offer.experts, offer.why) == (DEFAULT, 14, 128, "")


def test_a_folder_may_be_a_model_or_hold_models(tmp_path: Path) -> None:
    one = model(tmp_path / "one")
    many = tmp_path / "many"
    model(many / "b", {"model_type": "mixtral", "num_local_experts": 8}, 5)
    model(many / "a", {"text_config": {"n_routed_experts": 64}}, 7)
    (many / "notes").mkdir()
    (many / "readme.txt").write_text("")
    offers = shelf(tmp_path, one, many, one)
    assert [(o.label, o.size_bytes, o.experts, o.why) for o in offers[1:]] == [
        ("one", 200, 128, ""),
        ("a", 14, 64, ""),
        ("b", 10, 8, ""),
    ]
    assert [o.model_type for o in offers[1:]] == ["qwen3_moe", "", "mixtral"]
    assert offers[1].path == str(one)


def test_a_model_that_can_be_loaded_says_what_it_would_do(tmp_path: Path) -> None:
    good, bad = model(tmp_path / "good"), model(tmp_path / "bad", {"model_type": "llama"})
    store = SettingsStore(tmp_path / "data")
    store.update(model_folders=[str(good), str(bad)])
    asked = []

    def plan_of(path: str) -> str:
        asked.append(path)
        return "fits"

    environ = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    offers = ModelShelf(store, environ=environ, plan_of=plan_of)()
    assert [offer.plan for offer in offers] == ["", "fits", ""]
    assert asked == [str(good)]


@pytest.mark.parametrize(
    ("config", "weights", "why"),
    [
        (MIXTURE, 0, "no .safetensors"),
        ({"model_type": "llama"}, 9, "Not a mixture of experts"),
        ({"num_experts": 1}, 9, "Not a mixture of experts"),
        ({"num_experts": -5}, 9, "Not a mixture of experts"),
        ({"num_experts": 10**30}, 9, "Not a mixture of experts"),
        ({"num_experts": True}, 9, "Not a mixture of experts"),
        ({"num_experts": "128"}, 9, "Not a mixture of experts"),
        ({"num_experts": {"a": 128}, "text_config": [1]}, 9, "Not a mixture of experts"),
        (b"", 9, "not JSON"),
        (b"{", 9, "not JSON"),
        (b"[" * 200_000, 9, "not JSON"),
        (b"\xff\xfe{}", 9, "not JSON"),
        (b"[1]", 9, "not an object"),
        (b" " * (MAX_CONFIG_BYTES + 1), 9, "at most 1,048,576 are read"),
    ],
)
def test_why_a_folder_is_not_a_model(tmp_path: Path, config: Any, weights: int, why: str) -> None:
    offer = shelf(tmp_path, model(tmp_path / "m", config, weights))[1]
    assert why in offer.why
    assert not offer.supported


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        ({"moe_num_experts": [64, 32]}, 64),
        ({"ffn_config": {"moe_num_experts": 16}}, 16),
        ({"thinker_config": {"text_config": {"num_experts": 128}}}, 128),
        ({"model_type": {"a": 1}, "num_experts": 4, "num_local_experts": None}, 4),
    ],
)
def test_expert_counts_are_found_where_families_keep_them(
    tmp_path: Path, config: Any, experts: int
) -> None:
    offer = shelf(tmp_path, model(tmp_path / "m", config))[1]
    assert (offer.experts, offer.why) == (experts, "")


def test_folders_that_are_not_there_or_hold_nothing_say_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    offers = shelf(tmp_path, tmp_path / "gone", tmp_path / "empty", tmp_path / "file")
    assert [o.why for o in offers[1:]] == [
        "No such folder.",
        "No model was found in this folder.",
        "No such folder.",
    ]


def test_the_hugging_face_cache_is_read_without_its_library(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    repo = cache / "models--Qwen--Qwen3-30B-A3B"
    model(repo / "snapshots" / "older", weights=1)
    chosen = model(repo / "snapshots" / REVISION, weights=3)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    model(cache / "models--gpt2" / "snapshots" / "abc", {"model_type": "gpt2"})
    model(cache / "datasets--a--b" / "snapshots" / "abc")
    (cache / "models--half--done" / "snapshots").mkdir(parents=True)
    (cache / "models--broken").write_text("")
    (cache / "version.txt").write_text("1")
    offers = shelf(tmp_path)[1:]
    assert [(o.label, o.size_bytes, o.supported) for o in offers] == [
        ("Qwen/Qwen3-30B-A3B", 6, True),
        ("gpt2", 200, False),
    ]
    assert offers[0].path == str(chosen)
    assert offers[0].source == "Hugging Face cache"


@pytest.mark.parametrize("main", ["../../secret", "/etc", "", "x" * 5000, "\x00", "nope"])
def test_a_reference_cannot_lead_out_of_its_repository(tmp_path: Path, main: str) -> None:
    repo = tmp_path / "cache" / "models--a--b"
    snapshot = model(repo / "snapshots" / "abc")
    model(tmp_path / "secret")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(main)
    assert [o.path for o in shelf(tmp_path)[1:]] == [str(snapshot)]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX file kinds")
def test_odd_kinds_of_file_neither_block_nor_count(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    (folder / "a.safetensors").symlink_to(folder / "a.safetensors")
    (folder / "b.safetensors").mkdir()
    (folder / "c.safetensors").symlink_to("/dev/zero")
    offer = inspect_folder(folder, "m\u202egnp\n\x1b[1m", "folder")
    assert (offer.size_bytes, offer.supported) == (0, False)
    assert offer.label.isprintable()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert shelf(tmp_path, loop, folder)[1].why == "No such folder."


def test_folder_names_from_anywhere_never_raise(tmp_path: Path) -> None:
    odd = ["", "\udcff", "a" * 5000, "~nobody-here", "//host/share", "CON", "*?<>|"]
    store = SettingsStore(tmp_path / "data")
    store.update(model_folders=odd)
    offers = ModelShelf(store, environ={"HF_HOME": "~no-such-user/x"})()
    assert all(offer.label.isprintable() for offer in offers)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("num_experts", "text_config", "model_type", "ffn_config")), inner
        )
    ),
    max_leaves=12,
)


@given(values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_config_raises(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    offer = inspect_folder(tmp_path, "m", "folder")
    assert offer.supported == (offer.experts >= 2)


@pytest.mark.parametrize(
    ("environ", "end"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, Path("/a")),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, Path("/b/hub")),
        ({"XDG_CACHE_HOME": "/c"}, Path("/c/huggingface/hub")),
        ({}, Path.home() / ".cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], end: Path) -> None:
    assert cache_folder(environ) == end


def gguf(path: Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write a GGUF file without tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"general.architecture": "qwen3moe", "qwen3moe.expert_count": 128}
    tail = {"tokenizer.ggml.tokens": ["a"] * 1000}
    path.write_bytes(gguf_bytes((told if metadata is None else metadata) | tail, {}))
    return path


def test_gguf_files_are_models_wherever_they_lie(tmp_path: Path) -> None:
    root = tmp_path / "models"
    paths = [gguf(root / "A-Q4_K_M.gguf"), gguf(root / "repo" / "B-Q8_0.gguf")]
    gguf(root / "repo" / "mmproj-B.gguf")
    model(root / "hub", MIXTURE)
    offers = shelf(tmp_path, root)[1:]
    assert [(o.label, o.path) for o in offers] == [
        ("A-Q4_K_M", str(paths[0])),
        ("hub", str(root / "hub")),
        ("B-Q8_0", str(paths[1])),
    ]
    assert offers[0].supported
    assert (offers[0].experts, offers[0].model_type) == (128, "qwen3moe")
    assert offers[0].size_bytes == paths[0].stat().st_size
    (alone,) = shelf(tmp_path, paths[1])[1:]
    assert (alone.path, alone.supported) == (str(paths[1]), True)


def test_a_split_gguf_is_one_model_or_says_what_is_missing(tmp_path: Path) -> None:
    parts = [gguf(tmp_path / "m" / f"B-0000{n}-of-00003.gguf") for n in (1, 2, 3)]
    (offer,) = shelf(tmp_path, tmp_path / "m")[1:]
    assert (offer.label, offer.path, offer.why) == ("B", str(parts[0]), "")
    assert offer.size_bytes == sum(part.stat().st_size for part in parts)
    parts[1].unlink()
    (offer,) = shelf(tmp_path, tmp_path / "m")[1:]
    assert offer.why == "B-00002-of-00003.gguf is missing."


def test_downloaded_gguf_models_carry_the_name_of_their_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--o--n-GGUF" / "snapshots" / REVISION
    gguf(snapshot / "n-Q4_0.gguf")
    (snapshot / "config.json").write_text(json.dumps(MIXTURE))
    (offer,) = shelf(tmp_path)[1:]
    assert (offer.label, offer.why) == ("o/n-GGUF: n-Q4_0", "")
    assert offer.path == str(snapshot / "n-Q4_0.gguf")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF", "has 4"),
        (b"not a model at all", "does not begin with GGUF"),
        (b"GGUF" + b"\xff" * 20, "version"),
        (gguf_bytes({"general.architecture": "llama"}, {}), "names no experts"),
        (gguf_bytes({"general.architecture": 5, "5.expert_count": "x"}, {}), "names no experts"),
        (gguf_bytes({}, {}), "names no experts"),
    ],
)
def test_a_gguf_that_cannot_be_used_says_why(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "bad.gguf").write_bytes(content)
    (offer,) = shelf(tmp_path, tmp_path / "m")[1:]
    assert words in offer.why
    assert not offer.supported
