"""Every path, target, function and command named in the docs exists."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")],
)
_PATH = re.compile(
    r"`((?:\.ci|docs|services|kernels|proto|tests|models|scripts|deploy|benchmarks)/[\w./-]*)`"
)
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
_TARGET = re.compile(r"\bmake ((?:[a-z][a-z-]+ ?)+)")
_STEP = re.compile(r"\| `(services/[\w/]+\.py)` \| `(\w+)` \|")
_COMMAND = re.compile(r"paceline (up|generate|status|demo|bench|draft|simulate|doctor|explain)\b")
_METRIC = re.compile(r"`(paceline_[a-z0-9_]+)")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = [ROOT / path for path in _PATH.findall(text)]
    links = [page.parent / link for link in _LINK.findall(text) if "://" not in link]
    missing = [str(path) for path in [*paths, *links] if not path.exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_make_targets_exist(page: Path) -> None:
    named = {t for m in _TARGET.findall(page.read_text(encoding="utf-8")) for t in m.split()}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    code = {
        t for t in named if f"`make {t}" in page.read_text() or f"\nmake {t}" in page.read_text()
    }
    assert code - targets == set()


def test_every_step_of_the_request_names_a_function_that_exists() -> None:
    steps = _STEP.findall((ROOT / "docs" / "request.md").read_text(encoding="utf-8"))
    assert len(steps) > 25
    missing = [f"{path}: {name}" for path, name in steps if name not in _defined(ROOT / path)]
    assert missing == []


def test_every_command_named_exists() -> None:
    help_text = subprocess.run(
        [str(ROOT / ".venv" / "bin" / "paceline"), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    named = {
        command for page in PAGES for command in _COMMAND.findall(page.read_text(encoding="utf-8"))
    }
    assert named, "the docs name no command"
    assert [command for command in sorted(named) if command not in help_text] == []


def test_every_metric_named_is_declared() -> None:
    from paceline.process.metrics import Metrics

    declared = {family.name for family in Metrics("test").registry.collect()}
    suffix = re.compile(r"_(total|bucket|count|sum)$")
    named = {
        suffix.sub("", metric)
        for page in PAGES
        for metric in _METRIC.findall(page.read_text(encoding="utf-8"))
        if not metric.startswith("paceline_kernels")
    }
    assert sorted(named - declared) == []


def test_public_names_exist() -> None:
    import paceline_kernels

    for name in paceline_kernels.__all__:
        assert hasattr(paceline_kernels, name)


def _defined(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
