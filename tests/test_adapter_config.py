"""What a stranger's config.json and tokenizer may say, and what happens when they say more."""

from __future__ import annotations

import copy
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from runtime.adapter_config import build_skeleton, read_config
from runtime.errors import ModelError, ModelFilesError, PreScopeError, UnsupportedModelError
from tests.checkpoints import load
from tests.families import FAMILIES, MORE_FAMILIES, VOCAB, make_checkpoint


def edit_config(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(record), encoding="utf-8")


HOSTILE_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
    ({"num_hidden_layers": float("nan")}, "num_hidden_layers"),
    ({"num_hidden_layers": [2]}, "num_hidden_layers"),
    ({"num_hidden_layers": {"a": 2}}, "num_hidden_layers"),
    ({"hidden_size": 0}, "hidden_size = 0"),
    ({"hidden_size": 2**40}, "hidden_size"),
    ({"hidden_size": 64}, "layers.0"),
    ({"vocab_size": 2**62}, "vocab_size"),
    ({"num_local_experts": 2**40}, "num_local_experts"),
    ({"num_local_experts": 16}, "experts"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"max_position_embeddings": -5}, "max_position_embeddings"),
    ({"hidden_act": "os.system"}, "qwen3_moe"),
    ({"hidden_act": "x" * 10**5}, "hidden_act"),
    ({"rope_parameters": {"rope_theta": 2**50}}, "rope_parameters"),
    ({"mlp_only_layers": [0] * 300_000}, "mlp_only_layers"),
    ({"mlp_only_layers": [0, 1]}, "no routed experts"),
    ({"model_type": "brand_new"}, "brand_new"),
    ({"model_type": "brand_new", "auto_map": {"AutoConfig": "evil.Config"}}, "own code"),
    ({"model_type": None}, "no family"),
    ({"model_type": ["qwen3_moe"]}, "family"),
    ({"model_type": "dbrx"}, "dbrx"),
    ({"model_type": "bert"}, "bert"),
    ({"model_type": "clip"}, "clip"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ({"dtype": "evil"}, "evil"),
]


@pytest.mark.parametrize(("change", "named"), HOSTILE_CONFIGS, ids=lambda value: str(value)[:40])
def test_a_hostile_configuration_is_refused_by_name(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(ModelError) as refused:
        load(tmp_path)
    assert named in refused.value.message
    assert refused.value.next_step


def test_keys_that_choose_code_are_dropped_and_nothing_of_the_folder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    flag = tmp_path / "flag"
    trap = f"open({str(flag)!r}, 'w').close()"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenizer.py", "sitecustomize.py"):
        (tmp_path / name).write_text(trap, encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(f"cbuiltins\nexec\n(S{trap!r}\ntR.".encode())
    evil = {name: "evil/kernel" for name in ("attn_implementation", "transformers_weights")}
    evil |= {"_attn_implementation_internal": "evil/kernel", "_experts_implementation": "eager"}
    edit_config(
        tmp_path,
        evil
        | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "trust_remote_code": True},
    )

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    loaded = load(tmp_path)
    config = loaded.model.config
    assert config._attn_implementation == "sdpa"
    assert config._experts_implementation == "prescope"
    assert not any(hasattr(config, name) for name in ("auto_map", "trust_remote_code"))
    assert not flag.exists()
    assert not any(
        str(tmp_path) in str(getattr(module, "__file__", "")) for module in sys.modules.values()
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


# Text models and wrappers, attention of every kind; their small configurations, made once.
FUZZED = {
    name: (FAMILIES | MORE_FAMILIES)[name]().to_dict()
    for name in ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "gemma4", "longcat_flash")
}
NUMBERS = st.sampled_from([-1, 0, 1, 3, 7, 513, 10**5, 10**9, 2**40, 2**63, 1.5, 1e300])


def places(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the way to every value in a configuration and in those inside it."""
    found: list[tuple[str, ...]] = []
    for key, value in record.items():
        found.append((key,))
        if isinstance(value, dict) and key.endswith("_config"):
            found += [(key, *rest) for rest in places(value)]
    return found


# Files of today have the key still; that a later transformers will not is no reason to fail.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_configuration_is_built_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    family = data.draw(st.sampled_from(sorted(FUZZED)))
    record = copy.deepcopy(FUZZED[family])
    ways = places(record) + [("auto_map",), ("rope_scaling",), ("torch_dtype",)]
    for way in data.draw(st.lists(st.sampled_from(ways), min_size=1, max_size=3)):
        inside: Any = record
        for key in way[:-1]:
            inside = inside.get(key) if isinstance(inside, dict) else None
        if isinstance(inside, dict):
            inside[way[-1]] = data.draw(NUMBERS | values)
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    began_s = time.process_time()
    refused: PreScopeError | None = None
    try:
        skeleton = build_skeleton(read_config(folder), torch.float32)
    except PreScopeError as error:
        refused = error
    else:
        assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    assert refused is None or (refused.message and refused.next_step)
    assert time.process_time() - began_s < 10


ENDLESS = {
    "ernie4_5_vl_moe": ("vision_config", "depth", 10**6),
    "muse_spark": ("audio_config", "depths", [10**6]),
    "qwen3_omni_moe_thinker": ("audio_config", "encoder_layers", 2**40),
}


@pytest.mark.parametrize("family", ENDLESS)
def test_a_model_of_a_million_layers_is_not_built_to_its_end(family: str, tmp_path: Path) -> None:
    part, key, value = ENDLESS[family]
    record = MORE_FAMILIES[family]().to_dict()
    record[part][key] = value
    (tmp_path / "config.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelFilesError, match="more than 8192 modules"):
        build_skeleton(read_config(tmp_path), torch.float32)
    assert build_skeleton(MORE_FAMILIES[family](), torch.float32)


def write_tokenizer(folder: Path, words: int = VOCAB, **settings_: Any) -> None:
    vocabulary = {"</s>": 2, "<unk>": 0} | {f"w{n}": n for n in range(words) if n not in (0, 2)}
    Tokenizer(WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_), encoding="utf-8")


def test_the_tokenizer_is_what_its_json_says(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    assert load(tmp_path).tokenizer is None
    write_tokenizer(
        tmp_path,
        eos_token={"content": "</s>"},
        chat_template="{{ messages[0].content }}",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        tokenizer_class="EvilTokenizer",
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 99999, true]}')
    loaded = load(tmp_path)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("w5") == [5]
    assert loaded.eos_token_ids == (7, 2)
    assert loaded.has_chat_template
    messages = [{"role": "user", "content": "w9"}]
    assert loaded.tokenizer.apply_chat_template(messages, tokenize=False) == "w9"


@pytest.mark.parametrize(
    ("files", "expected", "named"),
    [
        ({"tokenizer.json": "{"}, ModelFilesError, "tokenizer.json"),
        ({"tokenizer.json": "not json"}, ModelFilesError, "tokenizer.json"),
        ({"tokenizer.json": '{"model": {"type": "Evil"}}'}, ModelFilesError, "tokenizer.json"),
        ({"tokenizer.model": "x"}, UnsupportedModelError, "tokenizer.model"),
        ({"tokenizer_config.json": '{"eos_token": 3}'}, ModelFilesError, "token"),
        ({"tokenizer_config.json": "["}, ModelFilesError, "tokenizer_config.json"),
        ({"chat_template.jinja": "x" * (2**20 + 1)}, ModelFilesError, "template"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_tokenizer_is_refused_by_name(
    files: dict[str, str], expected: type[ModelError], named: str, tmp_path: Path
) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    if "tokenizer.model" not in files:
        write_tokenizer(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(expected, match=named):
        load(tmp_path)


def test_token_ids_without_an_embedding_are_refused(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    write_tokenizer(tmp_path, words=VOCAB + 5)
    with pytest.raises(ModelFilesError, match=f"id {VOCAB + 4}.*{VOCAB}"):
        load(tmp_path)
