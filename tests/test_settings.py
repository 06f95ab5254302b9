"""Settings survive damage, hand edits and crashes; a bad value falls back alone, by name."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.settings import FILE_NAME, VERSION, Settings, SettingsStore
from runtime.core import (
    EXPERTS_WISHES,
    POLICIES,
    EmulatedMachine,
    LoadRequest,
    SamplingParams,
)
from runtime.errors import ConfigError

usable = st.builds(
    Settings,
    system_prompt=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    sampling=st.builds(
        SamplingParams,
        max_new_tokens=st.integers(1, 10_000),
        temperature=st.floats(0, 5),
        top_p=st.floats(0, 1),
        seed=st.none() | st.integers(0, 2**63 - 1),
    ),
    theme=st.sampled_from(("auto", "light", "dark")),
    model=st.sampled_from(("default", "/models/a b", "C:\\models\\é")),
    model_folders=st.lists(st.sampled_from(("/a", "/b", "/c")), unique=True).map(tuple),
    policy=st.none() | st.sampled_from(POLICIES),
    prediction=st.booleans(),
    emulated=st.builds(EmulatedMachine, link_bytes_per_s=st.floats(1, 1e12)),
    cache_fraction=st.none() | st.floats(0, 1),
    vram_bytes=st.none() | st.integers(0, 1 << 40),
    experts=st.sampled_from(EXPERTS_WISHES),
)
fresh = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(usable)
@fresh
def test_what_is_saved_is_read_back(tmp_path: Path, wanted: Settings) -> None:
    store = SettingsStore(tmp_path)
    fields = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted)}
    assert store.update(**fields) == wanted
    again = SettingsStore(tmp_path)
    assert (again.current(), again.notices) == (wanted, [])


def test_a_first_start_has_defaults_and_no_file(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path)
    assert (store.current(), store.notices) == (Settings(), [])
    assert list(tmp_path.iterdir()) == []
    assert store.current().load_request() == LoadRequest()


def test_groups_change_field_by_field(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path)
    store.update(sampling={"temperature": 0.7}, emulated={"vram_bytes": 5.0})
    store.update(sampling={"top_p": 0.9}, policy="hybrid", cache_fraction=0.25)
    store.update(model="/m", experts="int4")
    assert store.current().sampling == SamplingParams(temperature=0.7, top_p=0.9)
    assert store.current().emulated == EmulatedMachine(vram_bytes=5)
    assert store.current().load_request() == LoadRequest(
        model="/m",
        policy="hybrid",
        cache_fraction=0.25,
        emulated=EmulatedMachine(vram_bytes=5),
        experts="int4",
    )
    assert store.current().load_request("/other").model == "/other"


BAD_VALUES: list[tuple[str, Any]] = [
    ("system_prompt", 5),
    ("system_prompt", "nul \x00"),
    ("system_prompt", "x" * 100_001),
    ("theme", "neon"),
    ("theme", ["dark"]),
    ("model", None),
    ("model_folders", "/one"),
    ("model_folders", [1]),
    ("policy", "prescience"),
    ("prediction", 1),
    ("prediction", "on"),
    ("prediction", None),
    ("cache_fraction", 1.5),
    ("cache_fraction", float("nan")),
    ("vram_bytes", -1),
    ("vram_bytes", 1.5),
    ("vram_bytes", 10**400),
    ("sampling", 3),
    ("sampling.temperature", "hot"),
    ("sampling.temperature", float("inf")),
    ("sampling.temperature", True),
    ("sampling.max_new_tokens", 0),
    ("sampling.seed", -1),
    ("experts", "int2"),
    ("experts", None),
    ("experts", ["int4"]),
    ("emulated.link_bytes_per_s", 0),
    ("emulated.host_layer_s", 1e9),
    ("colour", "blue"),
    ("sampling.mirostat", 2),
]


def record_with(name: str, value: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"version": VERSION, "model": "/kept", "sampling": {"top_k": 7}}
    *group, key = name.split(".")
    (record.setdefault(group[0], {}) if group else record)[key] = value
    return record


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_falls_back_alone_and_is_named(tmp_path: Path, name: str, value: Any) -> None:
    raw = json.dumps(record_with(name, value)).encode()
    (tmp_path / FILE_NAME).write_bytes(raw)
    store = SettingsStore(tmp_path)
    assert f"The setting {name} " in store.notices[0]
    assert len(store.notices) == 2
    default = Settings(model="/kept", sampling=SamplingParams(top_k=7))
    if name == "model":
        default = dataclasses.replace(default, model="default")
    if name == "sampling":
        default = dataclasses.replace(default, sampling=SamplingParams())
    assert store.current() == default
    assert (tmp_path / f"{FILE_NAME}.bad").read_bytes() == raw
    assert (tmp_path / FILE_NAME).read_bytes() == raw


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_and_changes_nothing(tmp_path: Path, name: str, value: Any) -> None:
    store = SettingsStore(tmp_path)
    before = store.update(model="/kept")
    *group, key = name.split(".")
    with pytest.raises(ConfigError, match=f"The setting {name} "):
        store.update(**({group[0]: {key: value}} if group else {key: value}))
    assert store.current() == before == SettingsStore(tmp_path).current()


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\x00" * 100, b"[" * 100_000, b" " * ((1 << 20) + 1)],
    ids=["empty", "cut", "list", "null", "utf16", "zeros", "deep", "huge"],
)
def test_a_broken_file_is_kept_and_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(raw)
    store = SettingsStore(tmp_path)
    assert store.current() == Settings()
    assert "damaged" in store.notices[0]
    kept = (tmp_path / f"{FILE_NAME}.bad").read_bytes()
    assert kept == raw[: (1 << 20) + 1]
    assert store.update(theme="dark").theme == "dark"
    assert SettingsStore(tmp_path).notices == []


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    record = {"version": VERSION, "theme": "dark"}
    (tmp_path / FILE_NAME).write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode())
    store = SettingsStore(tmp_path)
    assert (store.current().theme, store.notices) == ("dark", [])


def test_a_file_from_before_prediction_has_it_on(tmp_path: Path) -> None:
    record = {"version": VERSION, "policy": "hybrid"}
    (tmp_path / FILE_NAME).write_text(json.dumps(record))
    store = SettingsStore(tmp_path)
    assert (store.current().prediction, store.notices) == (True, [])


def test_another_version_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({"version": VERSION + 1, "theme": "dark"}))
    store = SettingsStore(tmp_path)
    assert store.current().theme == "dark"
    assert f"version {VERSION + 1}" in store.notices[0]
    assert (tmp_path / f"{FILE_NAME}.bad").exists()


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ("version", "sampling", "emulated", "model", "seed", "vram_bytes", "x")
                ),
                inner,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
@fresh
def test_no_content_stops_the_start(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(raw)
    store = SettingsStore(tmp_path)
    assert isinstance(store.current(), Settings)
    store.update(**dataclasses.asdict(store.current()))


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    store = SettingsStore(tmp_path)
    assert "could not be read" in store.notices[0]
    with pytest.raises(ConfigError, match="could not be saved"):
        store.update(theme="dark")
    assert store.current() == Settings()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_crash_while_saving_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SettingsStore(tmp_path)
    store.update(theme="dark")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(ConfigError, match="No space left"):
                store.update(theme="light")
        assert SettingsStore(tmp_path).current().theme == "dark"
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no mode bits")
def test_only_this_user_can_read_the_settings(tmp_path: Path) -> None:
    SettingsStore(tmp_path).update(theme="dark")
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
