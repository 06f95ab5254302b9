"""The settings drawer: its fields, and how a field and the stored settings become each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.policies import policy_choices
from app.settings import Settings, SettingsStore
from app.ui_theme import part
from runtime.client import EngineClient
from runtime.core import SamplingParams
from runtime.errors import PreScopeError

MEGA = 1e6
GIGA = 1e9
_AUTOMATIC = "Automatic\nPreScope chooses what suits the model and this machine."
_PRECISIONS = (
    ("As stored\nThe model's own numbers: nothing is lost.", "as stored"),
    (
        "int8\nAbout half the memory of 16-bit experts, so more of them fit on the card. Answers"
        " can differ a little.",
        "int8",
    ),
    (
        "int4\nA little over a quarter of it. Answers differ more, and how much depends on the"
        " model: compare them on questions of your own.",
        "int4",
    ),
)


@dataclass(frozen=True)
class Field:
    """One control. `read` takes its value from the settings, `write` gives the change to store.

    `js` runs on the page first: a slider's box takes any number, and Gradio fails on a wrong one.
    """

    component: Any
    read: Callable[[Settings], Any]
    write: Callable[[Any], dict[str, Any]]
    js: str | None = None


@dataclass(frozen=True)
class Drawer:
    """The parts of the drawer that events use. `learning` has the switch of prediction and the
    button that forgets what the predictor learned, `kept` the list of quantised experts."""

    fields: dict[str, Field]
    reload: gr.Button
    learning: gr.HTML
    kept: gr.HTML


def drawer() -> Drawer:
    """Create the drawer inside the current Blocks."""
    made: dict[str, Field] = {}
    with gr.Column(elem_id="drawer", min_width=0):
        gr.HTML(html_template=part("drawer.html"), js_on_load=None, apply_default_css=False)
        with gr.Column(elem_classes="ps-group", min_width=0):
            _heading("Appearance")
            made["theme"] = Field(
                gr.Radio(
                    [("System", "auto"), ("Light", "light"), ("Dark", "dark")],
                    label="Theme",
                    elem_id="set-theme",
                ),
                lambda s: s.theme,
                lambda v: {"theme": v},
            )
        with gr.Column(elem_classes="ps-group", min_width=0):
            _heading("Answers")
            made["system_prompt"] = Field(
                gr.Textbox(
                    label="System prompt",
                    lines=3,
                    max_lines=10,
                    placeholder="Said to the model before every chat",
                    elem_id="set-system",
                ),
                lambda s: s.system_prompt,
                lambda v: {"system_prompt": v or ""},
            )
            made |= _sampling()
        with gr.Column(elem_classes="ps-group", min_width=0):
            _heading("Experts")
            made["policy"] = Field(
                gr.Radio(
                    [(_AUTOMATIC, ""), *policy_choices()],
                    label="Placement policy",
                    info="Changes from the next token on; Automatic from the next load on.",
                    elem_id="set-policy",
                ),
                lambda s: s.policy or "",
                lambda v: {"policy": v or None},
            )
            learning = gr.HTML(
                None,
                html_template=part("learning.html"),
                js_on_load="PreScope.learning(element, props, trigger, watch); "
                "['switch_prediction', 'forget_learned']",
                apply_default_css=False,
                elem_id="set-learning",
            )
            made["experts"] = Field(
                gr.Radio(
                    list(_PRECISIONS),
                    label="Precision of the experts",
                    info="From the next load on. A model that comes quantised stays as it is.",
                    elem_id="set-experts",
                ),
                lambda s: s.experts,
                lambda v: {"experts": v},
            )
            kept = gr.HTML(
                None,
                html_template=part("kept.html"),
                js_on_load="PreScope.kept(element, props, trigger, watch); "
                "['list_kept', 'delete_kept']",
                apply_default_css=False,
                elem_id="set-kept",
            )
            made["cache_fraction"] = Field(
                gr.Number(
                    label="Experts kept on the card (%)",
                    info="0 lets PreScope plan it.",
                    minimum=0,
                    maximum=100,
                    elem_id="set-cache",
                ),
                lambda s: round((s.cache_fraction or 0) * 100, 3),
                lambda v: {"cache_fraction": v / 100 if v else None},
            )
            made["vram_bytes"] = Field(
                gr.Number(
                    label="VRAM limit (GB)", info="0 is no limit.", minimum=0, elem_id="set-vram"
                ),
                lambda s: round((s.vram_bytes or 0) / GIGA, 3),
                lambda v: {"vram_bytes": int(v * GIGA) if v else None},
            )
        with gr.Column(elem_classes="ps-group", min_width=0):
            _heading("Models")
            made["model_folders"] = Field(
                gr.Textbox(
                    label="Model folders",
                    info="One folder per line. PreScope looks for models there, and never copies.",
                    lines=2,
                    max_lines=6,
                    elem_id="set-folders",
                ),
                lambda s: "\n".join(s.model_folders),
                lambda v: {
                    "model_folders": [line.strip() for line in v.split("\n") if line.strip()]
                },
            )
        with gr.Accordion("Emulated machine", open=False, elem_id="set-emulated"):
            gr.HTML(
                html_template='<p class="ps-note-plain">Used only where there is no GPU. '
                "Takes effect when a model is loaded.</p>",
                js_on_load=None,
                apply_default_css=False,
            )
            made |= _emulated()
            reload = gr.Button("Load the model again", size="sm", elem_id="reload")
    return Drawer(made, reload, learning, kept)


def _sampling() -> dict[str, Field]:
    made = {}
    for name, label, info, low, high, step in (
        ("temperature", "Temperature", "0 always takes the likeliest word.", 0, 2, 0.05),
        ("top_p", "Top-p", "", 0, 1, 0.01),
        ("top_k", "Top-k", "0 is off.", 0, 200, 1),
        ("min_p", "Min-p", "", 0, 1, 0.01),
        ("repetition_penalty", "Repetition penalty", "1 is off.", 0.8, 2, 0.01),
    ):
        slider = gr.Slider(
            low, high, step=step, label=label, info=info or None, elem_id=f"set-{name}"
        )
        clamp = f"(v) => Math.min({high}, Math.max({low}, Number(v) || 0))"
        made[name] = _sampled(name, slider, clamp)
    limit = gr.Number(label="Max new tokens", precision=0, minimum=1, elem_id="set-max_new_tokens")
    made["max_new_tokens"] = _sampled("max_new_tokens", limit)
    made["seed"] = Field(
        gr.Textbox(
            label="Seed", info="Empty: a fresh one each time.", max_lines=1, elem_id="set-seed"
        ),
        lambda s: "" if s.sampling.seed is None else str(s.sampling.seed),
        lambda v: {"sampling": {"seed": _whole(v)}},
    )
    return made


def _sampled(name: str, component: Any, js: str | None = None) -> Field:
    whole = isinstance(getattr(SamplingParams(), name), int)
    return Field(
        component,
        lambda s: getattr(s.sampling, name),
        lambda v: {"sampling": {name: int(v) if whole else v}},
        js,
    )


def _emulated() -> dict[str, Field]:
    made = {}
    for name, label, unit in (
        ("link_bytes_per_s", "Link (MB/s)", MEGA),
        ("cpu_expert_bytes_per_s", "Experts on the CPU (MB/s)", MEGA),
        ("cpu_expert_bytes_per_s_while_copying", "The same while copying (MB/s)", MEGA),
        ("device_bytes_per_s", "Experts on the card (MB/s)", MEGA),
        ("device_layer_s", "Dense work per layer (ms)", 1e-3),
        ("host_layer_s", "Host time per layer (ms)", 1e-3),
        ("link_call_s", "Start of a copy (ms)", 1e-3),
        ("cpu_call_s", "Start of CPU work (ms)", 1e-3),
        ("disk_bytes_per_s", "Disk (MB/s)", MEGA),
        ("disk_call_s", "Start of a read (ms)", 1e-3),
        ("vram_bytes", "VRAM (MB), 0: planned", MEGA),
    ):
        number = gr.Number(label=label, minimum=0, elem_id=f"set-{name}", min_width=120)
        made[name] = _modelled(name, number, unit)
    return made


def _modelled(name: str, component: Any, unit: float) -> Field:
    return Field(
        component,
        lambda s: round(getattr(s.emulated, name) / unit, 6),
        lambda v: {"emulated": {name: int(v * unit) if name == "vram_bytes" else (v or 0) * unit}},
    )


def _whole(text: str) -> Any:
    """Return the number a person typed, None for nothing; the store refuses the rest by name."""
    stripped = (text or "").strip()
    if not stripped:
        return None
    return int(stripped) if stripped.isdecimal() else stripped


def _heading(text: str) -> None:
    gr.HTML(html_template=f"<h3>{text}</h3>", js_on_load=None, apply_default_css=False)


class SettingsEvents:
    """The handlers of the drawer; stateless between calls."""

    def __init__(self, made: dict[str, Field], store: SettingsStore, engine: EngineClient) -> None:
        self._fields = made
        self._store = store
        self._engine = engine
        self._count = itertools.count(1)

    def read(self) -> list[Any]:
        """Return the value of every field, in the order of the drawer."""
        settings = self._store.current()
        return [field.read(settings) for field in self._fields.values()]

    def saver(self, name: str) -> Callable[[Any], Any]:
        """Return the handler that stores one field and answers with a note when it cannot."""

        def save(value: Any) -> Any:
            field = self._fields[name]
            if value is None or value == field.read(self._store.current()):
                return gr.skip()
            try:
                settings = self._store.update(**field.write(value))
                if name == "policy" and settings.policy:
                    self._engine.set_policy(settings.policy)
            except PreScopeError as error:
                note = {"text": error.message, "next": error.next_step, "field": name}
                return {**note, "n": f"s{next(self._count)}"}
            return {"text": "", "field": name, "n": f"s{next(self._count)}"}

        return save

    def switched(self, event: gr.EventData) -> Any:
        """Turn prediction on or off, now and for every model to come."""
        try:
            settings = self._store.update(prediction=event.on)
            self._engine.set_prediction(settings.prediction)
        except PreScopeError as error:
            note = {"text": error.message, "next": error.next_step, "field": "prediction"}
            return {**note, "n": f"s{next(self._count)}"}
        return {"text": "", "field": "prediction", "n": f"s{next(self._count)}"}

    def forgot(self) -> dict[str, Any]:
        """Take the loaded model's predictor back to how it came, and say so beside the button."""
        mark = next(self._count)
        if self._engine.status().model is None:
            return {"text": "No model is loaded.", "bad": True, "n": mark}
        try:
            self._engine.reset_predictor()
        except PreScopeError as error:
            return {"text": f"{error.message} {error.next_step}".strip(), "bad": True, "n": mark}
        return {"text": "Forgotten.", "n": mark}
