"""The files around the code: the workflow, the hooks and the forms name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").exists())
WORKFLOW = ROOT / ".github" / "workflows" / "checks.yml"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z]+):", text, re.M))


def test_the_workflow_runs_targets_of_the_makefile() -> None:
    steps = [step for job in read(WORKFLOW)["jobs"].values() for step in job["steps"]]
    called = {m for step in steps for m in re.findall(r"make (\w+)", step.get("run", ""))}
    assert {"lint", "sdist"} <= called <= targets()


def test_the_workflow_tests_every_python_from_the_oldest_supported() -> None:
    pythons = read(WORKFLOW)["jobs"]["tests"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    minors = [int(python.split(".")[1]) for python in pythons]
    assert minors == list(range(int(oldest.group(1)), 15))
    assert all(isinstance(python, str) for python in pythons)  # 3.10 without quotes is 3.1


def test_the_hooks_run_the_linters_of_make_lint() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in repository["hooks"]:
        tool = re.match(r"\.venv/bin/python -m (ruff \w+|mypy)", hook["entry"])
        assert tool is not None and f"-m {tool.group(1)}" in makefile


def test_the_forms_have_what_a_form_needs() -> None:
    forms = set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    for path in sorted(forms - {ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"}):
        form = read(path)
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_links_of_contributing_lead_somewhere() -> None:
    page = ROOT / ".github" / "CONTRIBUTING.md"
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert links
    missing = [link for link in links if not (page.parent / link).resolve().exists()]
    assert not missing
