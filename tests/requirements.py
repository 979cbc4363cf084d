"""What extras of pyproject.toml require, one a line: `python tests/requirements.py dev gpu`.

pip reads them from the package, once its extension is built; the Makefile has them installed while
it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def of(extras: list[str], project: dict[str, Any]) -> list[str]:
    """Their requirements and the package's own, each once; an extra of the package is opened."""
    found, left = list(project["dependencies"]), list(extras)
    for extra in left:
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            left += [x.strip() for x in own[1].split(",")] if own else []
            found += [] if own else [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())
    print("\n".join(of(sys.argv[1:], read["project"])))
