"""The documents as pages that open from disk, in build/docs: `make docs`.

Every README becomes a page where it stands in the tree, the public modules' docstrings become the
reference (pdoc), and every link within the result must lead somewhere: else exit status 1.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import markdown2
import pdoc
import pdoc.doc
import pdoc.render

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", "build", "node_modules", ".pytest_cache"}

# what users call; the rest of the package is for who works on it, and its READMEs say how
API = (
    "fastkd",
    "fastkd.losses",
    "fastkd.distill",
    "fastkd.integrations",
    "fastkd.teachers",
    "fastkd.recipes.runner",
)
INNER = ("engine", "backends", "parallel", "arguments", "scan", "demo", "recipes", "rows")

STYLE = """
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1.5rem;
  font: 16px/1.55 system-ui, sans-serif; color: #1c1e21; background: #fff }
nav { border-bottom: 1px solid #ddd; padding-bottom: .6rem; margin-bottom: 1rem; font-size: 90% }
nav a { margin-right: .9rem; white-space: nowrap; display: inline-block }
pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; border-radius: 4px; line-height: 1.4 }
code { font: 90% ui-monospace, monospace }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: 1px solid #ddd; padding: .3rem .6rem; vertical-align: top; text-align: left }
img { max-width: 100% }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e4e6ea } pre { background: #22252b }
  td, th, nav { border-color: #3a3e46 } a { color: #8ab4f8 }
}
"""


def pages() -> list[Path]:
    """The READMEs, the first one first, relative to the root."""
    found = [
        page.relative_to(ROOT)
        for page in ROOT.rglob("README.md")
        if not SKIPPED & set(page.relative_to(ROOT).parts)
    ]
    found += [Path("CHANGELOG.md")]
    return sorted(found, key=lambda page: (len(page.parts), page != Path("README.md"), page))


def target(page: Path) -> Path:
    return Path("index.html") if page == Path("README.md") else page.with_suffix(".html")


def relative(to: Path, start: Path) -> str:
    return "/".join([".."] * (len(start.parts) - 1) + list(to.parts))


def name(page: Path) -> str:
    if page.name != "README.md":
        return page.stem.lower()
    return "fastkd" if page == Path("README.md") else str(page.parent)


def title(page: Path) -> str:
    return (ROOT / page).read_text().splitlines()[0].lstrip("# ")


def linked(text: str, page: Path, known: list[Path], out: Path) -> str:
    """Links to a README lead to its page, images are taken along, other files become plain text."""

    def one(match: re.Match[str]) -> str:
        mark, words, link = match.groups()
        if "://" in link or link.startswith("#"):
            return match[0]
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path
        inside = there.resolve().relative_to(ROOT)
        if inside in known:
            to = relative(target(inside), target(page)) + ("#" + anchor if anchor else "")
        elif mark:
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there, out / inside)
            to = relative(inside, target(page))
        else:
            return words
        return f"{mark}[{words}]({to})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", one, text)


def write_pages(out: Path) -> None:
    known = pages()
    for page in known:
        text = linked((ROOT / page).read_text(), page, known, out)
        body = markdown2.markdown(
            text, extras=["fenced-code-blocks", "tables", "header-ids", "cuddled-lists"]
        )
        menu = [("API reference", Path("api/fastkd.html"))] + [(name(p), target(p)) for p in known]
        nav = "".join(
            f'<a href="{relative(to, target(page))}">{html.escape(words)}</a>' for words, to in menu
        )
        there = out / target(page)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{html.escape(title(page))}'
            f"</title><style>{STYLE}</style><nav>{nav}</nav>{body}</html>\n"
        )


def write_reference(out: Path) -> None:
    pdoc.render.configure(docformat="google", footer_text="fastkd", search=True)
    # of names that modules import for type checkers alone, and of fields of a TypedDict
    warnings.filterwarnings("ignore", category=UserWarning, module=r"pdoc\.")
    hidden = [f"!fastkd.{inner}" for inner in INNER]
    pdoc.pdoc("fastkd", *hidden, *API[1:], output_directory=out / "api")
    for page in (out / "api").rglob("*.html"):
        page.write_text(unlinked(page.read_text()))


def unlinked(text: str) -> str:
    """Private bases, and what is inherited from a framework, are named and have no place here."""
    places = set(re.findall(r'id="([^"]+)"', text))

    def one(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        private = anchor.startswith("_") or "._" in anchor
        return match[2] if private or (not path and anchor not in places) else match[0]

    return re.sub(r'<a href="([^"]*#[^"]*)">(.*?)</a>', one, text)


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.S)
    for match in re.finditer(r'(?:href|src)="([^"]+)"', text):
        link = html.unescape(match[1])
        if "://" not in link and not link.startswith(("data:", "mailto:")):
            yield unquote(link)


def broken(out: Path) -> list[str]:
    """Links of the pages that lead to no file, or to a heading that is not there."""
    anchors: dict[Path, set[str]] = {}
    found = []
    for page in sorted(out.rglob("*.html")):
        for link in links(page):
            path, _, anchor = link.partition("#")
            there = (page.parent / path).resolve() if path else page.resolve()
            if not there.exists():
                found.append(f"{page.relative_to(out)}: {link}")
            elif anchor and there.suffix == ".html":
                if there not in anchors:
                    anchors[there] = set(re.findall(r'(?:id|name)="([^"]+)"', there.read_text()))
                if anchor not in anchors[there]:
                    found.append(f"{page.relative_to(out)}: {link}")
    return found


def main() -> int:
    out = ROOT / "build" / "docs"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_reference(out)
    write_pages(out)
    wrong = broken(out)
    print("\n".join(wrong) or f"{len(list(out.rglob('*.html')))} pages in {out}: open index.html")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
