"""What the README says is there is there, and the other way round."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("## File tree")[1].split("```")[1]


def modules(package: str) -> list[Path]:
    folder = ROOT / package
    return [path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("package", ["app", "runtime"])
def test_the_tree_has_every_module_with_its_own_first_sentence(package: str) -> None:
    for path in modules(package):
        summary = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
        name = path.relative_to(ROOT / package).as_posix()
        line = rf"^  {re.escape(name)} +{re.escape(summary.rstrip('.'))}$"
        assert re.search(line, TREE, re.MULTILINE), f"{package}/{name}: {summary}"


def test_everything_in_the_tree_exists() -> None:
    package = ""
    for line in TREE.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            package = name
            assert (ROOT / name).exists(), name
        else:
            assert (ROOT / package / name).exists(), package + name


def test_every_link_and_picture_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_are_those_of_the_help() -> None:
    told = subprocess.run(
        [sys.executable, "launcher.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    commands = set(re.findall(r"^  ([a-z]+) +\S", told.split("commands:")[1], re.MULTILINE))
    named = set(re.findall(r"python3 launcher\.py ([a-z]+)", README))
    assert commands == named


def test_the_changelog_knows_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
