"""Colours for Gradio's own components, and the head of the page with our styles and scripts."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STYLES = Path(__file__).with_name("styles")
FAVICON = STYLES / "favicon.svg"
_CSS = ("base.css", "list.css", "chat.css", "panel.css", "prediction.css", "drawer.css")
_JS = (
    "core.js",
    "live.js",
    "heat.js",
    "stalls.js",
    "prediction.js",
    "kept.js",
    "panel.js",
    "list.js",
    "status.js",
    "chat.js",
)
_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Cascadia Mono", "Menlo", "Consolas", "monospace"]


def part(name: str) -> str:
    """Return the text of one file in `styles`."""
    return (STYLES / name).read_text(encoding="utf-8")


def head() -> str:
    """Return the page's head: styles and scripts inline, so that they are there before the parts.

    Gradio may put the head into the page twice; the script minds and runs once.
    """
    css = "\n".join(part(name) for name in _CSS)
    js = "\n".join(part(name) for name in _JS)
    return f"<style>\n{css}\n</style>\n<script>\nif (!window.PreScope) {{\n{js}\n}}\n</script>"


def theme() -> gr.themes.Base:
    """Return the theme: Gradio's variables are set to ours, which know light and dark."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.amber,
        neutral_hue=gr.themes.colors.stone,
        font=_SANS,
        font_mono=_MONO,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
    ).set(**_variables())


def _variables() -> dict[str, str]:
    pairs = {
        "body_background_fill": "var(--ps-bg)",
        "body_text_color": "var(--ps-text)",
        "body_text_color_subdued": "var(--ps-muted)",
        "background_fill_primary": "var(--ps-bg)",
        "background_fill_secondary": "var(--ps-side)",
        "block_background_fill": "transparent",
        "block_border_color": "var(--ps-line)",
        "block_label_text_color": "var(--ps-muted)",
        "block_title_text_color": "var(--ps-text)",
        "block_info_text_color": "var(--ps-muted)",
        "border_color_primary": "var(--ps-line)",
        "border_color_accent": "var(--ps-accent)",
        "color_accent_soft": "var(--ps-accent-soft)",
        "link_text_color": "var(--ps-link)",
        "link_text_color_hover": "var(--ps-link)",
        "link_text_color_active": "var(--ps-link)",
        "link_text_color_visited": "var(--ps-link)",
        "input_background_fill": "var(--ps-input)",
        "input_background_fill_focus": "var(--ps-input)",
        "input_border_color": "var(--ps-line-strong)",
        "input_border_color_focus": "var(--ps-accent)",
        "input_placeholder_color": "var(--ps-faint)",
        "input_border_width": "1px",
        "input_shadow": "none",
        "input_shadow_focus": "none",
        "slider_color": "var(--ps-accent)",
        "button_primary_background_fill": "var(--ps-accent)",
        "button_primary_background_fill_hover": "var(--ps-accent-strong)",
        "button_primary_text_color": "var(--ps-accent-ink)",
        "button_primary_text_color_hover": "var(--ps-accent-ink)",
        "button_primary_border_color": "transparent",
        "button_secondary_background_fill": "var(--ps-raised)",
        "button_secondary_background_fill_hover": "var(--ps-hover)",
        "button_secondary_text_color": "var(--ps-text)",
        "button_secondary_border_color": "var(--ps-line-strong)",
        "button_secondary_border_color_hover": "var(--ps-line-strong)",
        "checkbox_background_color": "var(--ps-input)",
        "checkbox_background_color_selected": "var(--ps-accent)",
        "checkbox_border_color": "var(--ps-line-strong)",
        "checkbox_border_color_focus": "var(--ps-accent)",
        "checkbox_border_color_selected": "var(--ps-accent)",
        "checkbox_label_background_fill": "var(--ps-raised)",
        "checkbox_label_background_fill_hover": "var(--ps-hover)",
        "checkbox_label_background_fill_selected": "var(--ps-accent-soft)",
        "checkbox_label_text_color": "var(--ps-text)",
        "checkbox_label_text_color_selected": "var(--ps-text)",
        "checkbox_label_border_color": "var(--ps-line)",
        "checkbox_label_border_color_hover": "var(--ps-line-strong)",
        "code_background_fill": "var(--ps-code)",
        "error_background_fill": "var(--ps-bad-soft)",
        "error_border_color": "var(--ps-bad)",
        "error_text_color": "var(--ps-bad)",
        "table_border_color": "var(--ps-line)",
        "table_even_background_fill": "transparent",
        "table_odd_background_fill": "transparent",
    }
    return pairs | {f"{name}_dark": value for name, value in pairs.items()}
