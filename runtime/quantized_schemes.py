"""What a stranger's `quantization_config` says about its weights, checked and made small.

Nothing of it reaches a library. Only methods, keys and values whose meaning is known are taken;
everything else is refused by name, because a wrong reading gives a model that talks nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.errors import UnsupportedModelError
from runtime.quantized_keys import SILENT_KEYS

METHODS = ("auto-round", "awq", "compressed-tensors", "fp8", "gptq", "mxfp4")
MAX_GROUP = 2**20
_MAX_SCHEMES = 64
_OTHER = "Choose a version of this model in bfloat16, FP8, MXFP4, AWQ, GPTQ or GGUF."

_PACKED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """How some linear layers of a file are quantised.

    A block of `rows` x `columns` weights (outputs x inputs) shares a scale; 0 columns stand for
    whole rows, and 0 rows leave it to the scales' own shape. `zeros` says whether a block has a
    zero point, `zeros_less_one` whether the file keeps it one lower than it is.
    """

    bits: int
    floating: bool = False
    rows: int = 1
    columns: int = 0
    zeros: bool = False
    zeros_less_one: bool = False


@dataclass(frozen=True)
class Quantisation:
    """The method of a file and the schemes that its layers may follow."""

    method: str
    schemes: tuple[Scheme, ...]


def quantisation_from(record: object) -> Quantisation:
    """Check the `quantization_config` of a config.json.

    Raises:
        UnsupportedModelError: names the method, or the key and value, that cannot be read.
    """
    if not isinstance(record, dict):
        _refuse("its quantization_config is not an object")
    method = record.get("quant_method")
    if method not in METHODS:
        named = repr(method)[:60] if method else "of an unnamed kind"
        raise UnsupportedModelError(f"Quantised weights ({named}) cannot be read.", _OTHER)
    read = {
        "auto-round": _auto_round,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "gptq": _gptq,
        "mxfp4": _mxfp4,
    }[method]
    rest = dict(record)
    schemes = read(rest)
    _nothing_else(rest, method, SILENT_KEYS["any"] | SILENT_KEYS[method])
    if method == "auto-round":
        method = "awq" if _is_packed_as_awq(record) else "gptq"
    return Quantisation(method, schemes)


def _auto_round(rest: dict[str, Any]) -> tuple[Scheme, ...]:
    """AutoRound writes the layouts of others: the method becomes theirs."""
    where = "auto-round"
    awq = _is_packed_as_awq(rest)
    layout = rest.pop("packing_format", None)
    if layout not in ("auto_round:auto_awq", "auto_awq", "auto_round:auto_gptq", "auto_gptq"):
        _refuse_value(where, "packing_format", layout, "only auto_gptq and auto_awq are read")
    layers = rest.pop("extra_config", None) or {}
    if not isinstance(layers, dict) or not all(map(_is_left_plain, layers.values())):
        _refuse_value(where, "extra_config", layers, "layers with settings of their own")
    _one_of(rest, where, "data_type", ("int",), "int")
    _one_of(rest, where, "act_bits", (16, 32), 16)
    # In the layout of GPTQ, numbers with zero points are packed in more than one way.
    if _one_of(rest, where, "sym", (True, False), False) is False and not awq:
        _refuse_value(where, "sym", False, "zero points are not read in this layout")
    bits = _integer(rest, where, "bits", None, (4,) if awq else (4, 8))
    return (Scheme(bits, columns=_group(rest, where), zeros=awq, zeros_less_one=not awq),)


def _is_left_plain(layer: object) -> bool:
    bits = layer.get("bits") if isinstance(layer, dict) else None
    return isinstance(bits, int) and bits >= 16


def _is_packed_as_awq(record: Mapping[str, Any]) -> bool:
    return str(record.get("packing_format")).endswith("auto_awq")


def _awq(rest: dict[str, Any]) -> tuple[Scheme, ...]:
    bits = _integer(rest, "awq", "bits", 4, (4,), alias="w_bit")
    group = _group(rest, "awq", alias="q_group_size")
    _one_of(rest, "awq", "zero_point", (True,), True)
    for key in ("version", "format", "checkpoint_format"):
        value = rest.pop(key, None)
        if value is not None and str(value).lower() != "gemm":
            _refuse_value("awq", key, value, "only the gemm layout is read")
    return (Scheme(bits, columns=group, zeros=True),)


def _gptq(rest: dict[str, Any]) -> tuple[Scheme, ...]:
    bits = _integer(rest, "gptq", "bits", None, (4, 8))
    group = _group(rest, "gptq")
    for key in ("desc_act", "actorder"):
        reason = "its weights are in the order of activations (act-order), which is not read"
        _one_of(rest, "gptq", key, (False,), False, reason)
    symmetric = _one_of(rest, "gptq", "sym", (True, False), False)
    layouts = [rest.pop(key, None) or "gptq" for key in ("checkpoint_format", "format")]
    for layout in layouts:
        if layout not in ("gptq", "gptq_v2"):
            _refuse_value("gptq", "checkpoint_format", layout, "only gptq and gptq_v2 are read")
    _one_of(rest, "gptq", "is_marlin_format", (False,), False)
    _one_of(rest, "gptq", "pack_dtype", ("int32",), "int32")
    overrides = rest.pop("dynamic", None) or {}
    if not isinstance(overrides, dict) or any(
        not str(name).startswith("-:") and value for name, value in overrides.items()
    ):
        _refuse_value("gptq", "dynamic", overrides, "layers with settings of their own")
    return (
        Scheme(
            bits,
            columns=group,
            zeros=not symmetric,
            zeros_less_one="gptq_v2" not in layouts,
        ),
    )


def _fp8(rest: dict[str, Any]) -> tuple[Scheme, ...]:
    _one_of(rest, "fp8", "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    experts = _one_of(rest, "fp8", "expert_dtype", ("fp8", "fp4"), "fp8")
    _one_of(rest, "fp8", "scale_fmt", ("float", "ue8m0"), "float")
    block = rest.pop("weight_block_size", (128, 128))
    rows, columns = (0, 0) if block is None else _block("fp8", "weight_block_size", block)
    schemes = (Scheme(8, True, rows, columns),)
    return schemes if experts == "fp8" else (*schemes, Scheme(4, True, columns=32))


def _mxfp4(rest: dict[str, Any]) -> tuple[Scheme, ...]:
    return (Scheme(4, True, columns=32),)


def _compressed_tensors(rest: dict[str, Any]) -> tuple[Scheme, ...]:
    method = "compressed-tensors"
    layouts = [rest.pop("format", "pack-quantized")]
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        value = rest.pop(key, None)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            _refuse_value(method, key, value, "sparse or transformed weights are not read")
    groups = rest.pop("config_groups", None)
    if not isinstance(groups, dict) or not 0 < len(groups) <= _MAX_SCHEMES:
        _refuse_value(method, "config_groups", groups, "it has to describe the weights")
    schemes = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            _refuse_value(method, f"config_groups.{name}", group, "named presets are not read")
        layouts.append(group.get("format") or layouts[0])
        silent = {"targets", "input_activations", "output_activations", "weights", "format"}
        _nothing_else(group, f"{method}: config_groups.{name}", silent)
        schemes.append(_weights(f"{method}: config_groups.{name}.weights", group.get("weights")))
    allowed = (*_PACKED_FORMATS, "mixed-precision", "dense")
    for layout in layouts:
        if layout not in allowed:
            _refuse_value(method, "format", layout, f"only {', '.join(_PACKED_FORMATS)} are read")
    return tuple(dict.fromkeys(schemes))


def _weights(where: str, record: object) -> Scheme:
    if not isinstance(record, dict):
        _refuse(f"{where} does not say how the weights are quantised")
    rest = dict(record)
    kind = _one_of(rest, where, "type", ("int", "float"), "int")
    bits = _integer(rest, where, "num_bits", 8, (4, 8) if kind == "int" else (8,))
    reason = "its weights are in the order of activations (act-order), which is not read"
    _one_of(rest, where, "actorder", (None, False, "weight", "static"), None, reason)
    _one_of(rest, where, "dynamic", (False,), False)
    symmetric = _one_of(rest, where, "symmetric", (True, False), True)
    strategy = _one_of(rest, where, "strategy", ("tensor", "channel", "group", "block"), None)
    group = rest.pop("group_size", None)
    structure = rest.pop("block_structure", None)
    silent = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
    _nothing_else(rest, where, silent)
    rows, columns = 1, 0
    if strategy == "block":
        rows, columns = _block(where, "block_structure", structure)
    elif strategy == "tensor":
        rows = 0
    elif strategy == "group" or (strategy is None and group not in (None, -1)):
        columns = _group({"group_size": group}, where)
    return Scheme(bits, kind == "float", rows, columns, zeros=not symmetric)


def _block(where: str, key: str, value: object) -> tuple[int, int]:
    sizes = list(value) if isinstance(value, (list, tuple)) else []
    if len(sizes) != 2 or any(type(n) is not int or not 0 < n <= MAX_GROUP for n in sizes):
        _refuse_value(where, key, value, "two sizes of a block are needed")
    return (sizes[0], sizes[1])


def _group(rest: dict[str, Any], where: str, alias: str = "") -> int:
    """Return the columns that share a scale; 0 for whole rows."""
    value = rest.pop("group_size", None)
    value = rest.pop(alias, value) if value is None else value
    if value == -1:
        return 0
    if type(value) is not int or not 0 < value <= MAX_GROUP:
        _refuse_value(where, "group_size", value, f"it is not between 1 and {MAX_GROUP}")
    return value


def _integer(
    rest: dict[str, Any],
    where: str,
    key: str,
    default: int | None,
    allowed: tuple[int, ...],
    alias: str = "",
) -> int:
    value = rest.pop(key, None)
    value = rest.pop(alias, default) if value is None else value
    if type(value) is not int or value not in allowed:
        _refuse_value(where, key, value, f"only {' and '.join(map(str, allowed))} can be read")
    return value


def _one_of(
    rest: dict[str, Any],
    where: str,
    key: str,
    allowed: tuple[Any, ...],
    default: Any,
    reason: str = "",
) -> Any:
    value = rest.pop(key, default)
    # True == 1 in Python, but not in a checked file.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        if value is None:
            return default
        _refuse_value(where, key, value, reason or f"only {allowed} can be read")
    return value


def _nothing_else(rest: Mapping[str, Any], where: str, silent: frozenset[str] | set[str]) -> None:
    for key, value in rest.items():
        # An unknown switch that is off changes nothing.
        if key not in silent and value not in (None, False, "", [], {}):
            _refuse_value(where, key, value, "what this key means is not known")


def _refuse_value(where: str, key: str, value: object, reason: str) -> NoReturn:
    _refuse(f"{where}: {key} = {str(value)[:60]!s}: {reason}")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModelError(f"Quantised weights cannot be read: {what[:300]}.", _OTHER)
