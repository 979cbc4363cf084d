"""The documents: the first page is short, its example runs, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT)
    for folder in ("", "fastkd", "csrc", "bench", "tests", ".github")
    for page in (ROOT / folder).glob("*.md" if not folder else "**/*.md")
    if "node_modules" not in page.parts
)


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_the_first_page_has_every_extra() -> None:
    made = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    table = (ROOT / "README.md").read_text().partition("| extra | for |\n")[2].partition("\n\n")[0]
    named = " ".join(row.split("|")[1] for row in table.splitlines())
    extras = re.findall(r"^(\w+) = ", made.partition("\n[")[0], re.MULTILINE)
    assert sorted(extras) == sorted(re.findall(r"`(\w+)`", named))


def test_the_demo_s_page_has_each_variable_of_its_command() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo: ")[2].partition("\n\n")[0]
    variables = {*re.findall(r"\(([A-Z]+)\)", recipe)} - {"RUN", "VENV"}
    assert variables == {"TEXT", "PRESET", "SEEDS"}
    page = (ROOT / "fastkd/demo/README.md").read_text()
    assert all(f"`make demo {name}=" in page for name in variables)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    broken = [
        link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()
    ]
    assert not broken


def test_the_trainer_s_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (example,) = (block for block in blocks if "load_digits" in block)
    # fewer steps: what is tested is that each line runs
    example = example.replace("epochs=10", "epochs=1").replace("epochs=30", "epochs=1")
    for _ in range(2):  # as people do: the second run finds the checkpoints of the first
        exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "exported").is_dir() and (tmp_path / "run").exists()
