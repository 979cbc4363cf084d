"""The package as a user gets it, in build/sdist: `python tests/sdist.py`, or `make sdist`.

A copy of the checkout without anything built gives the sdist, the sdist the wheel, and the wheel is
used from an environment of its own. That sees this interpreter's torch, but neither the checkout
nor an editable installation's finder, which would answer for whatever the package lacks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# of the checkout, what an sdist is made of
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "fastkd")
BUILT = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", ".*")

USE = """
import runpy
import sys
from pathlib import Path

import torch

import fastkd
from fastkd import _C, distill
from fastkd.recipes import runner

inside = Path(sys.prefix).resolve()
for module in (fastkd, _C, distill, runner):
    assert inside in Path(module.__file__).resolve().parents, (module.__file__, inside)
assert not [x for x in sys.meta_path if "editable" in getattr(x, "__module__", "")], sys.meta_path
x, y = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
loss = fastkd.kl_div(x, y)
loss.backward()
with fastkd.use_backend("reference"):
    torch.testing.assert_close(loss, fastkd.kl_div(x, y))
assert fastkd.info()["cpu"] and fastkd.info()["backend"] == "cpu", fastkd.info()
assert runner.listing(list(runner.known().values()))
print(f"a loss ran on {_C.__file__}")
# as python -m fastkd info, in this process
sys.argv = ["fastkd", "info"]
runpy.run_module("fastkd", run_name="__main__", alter_sys=True)
"""


def copy(to: Path) -> Path:
    """The parts, without anything that was built in them."""
    to.mkdir(parents=True)
    for part in (ROOT / name for name in PARTS):
        if part.is_dir():
            shutil.copytree(part, to / part.name, ignore=BUILT)
        else:
            shutil.copy(part, to)
    return to


def files(folder: Path) -> set[str]:
    """Names of all files beneath, from the folder on."""
    return {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}


def packed(archive: Path) -> set[str]:
    """Names of all files of an sdist, without its first folder, or of a wheel."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as opened:
        return {x.name.partition("/")[2] for x in opened.getmembers() if x.isfile()}


def unpacked(sdist: Path) -> Path:
    """The folder that it is of, beside it."""
    with tarfile.open(sdist) as opened:
        opened.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


def lacking(have: Iterable[str], want: Iterable[str], what: str) -> None:
    """SystemExit that names what is wanted and not there."""
    if missing := sorted(set(want) - set(have)):
        raise SystemExit(f"{what}: got no {', '.join(missing)}")


def check_wheel(wheel: Path, source: set[str]) -> None:
    """It has the package's files, one extension, and no other."""
    want = {name for name in source if name.startswith("fastkd/")}
    have = {name for name in packed(wheel) if ".dist-info/" not in name}
    lacking(have, want, wheel.name)
    more = sorted(have - want)
    if len(more) != 1 or not re.fullmatch(r"fastkd/_C\.[\w.-]*(so|pyd)", more[0]):
        raise SystemExit(f"{wheel.name}: got {more} beside the sources, expected one extension")


def environment(folder: Path) -> Path:
    """The interpreter of a new one, which has the packages of this one and none of its hooks.

    A folder named by a .pth file is searched, and its own .pth files, an editable finder among
    them, are not read.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "torch.pth").write_text("\n".join(sorted(here)) + "\n")
    return Path(sysconfig.get_path("scripts", "venv", paths)) / Path(sys.executable).name


def main(folder: Path = ROOT / "build" / "sdist") -> None:
    """Builds and checks all of it."""
    shutil.rmtree(folder, ignore_errors=True)
    source = copy(folder / "source")
    # -O0: a fourth of the time; the files are in question here, not what the optimiser makes
    there = {**os.environ, "FASTKD_REQUIRE_CPU": "1", "FASTKD_CXXFLAGS": "-O0"}
    want = files(source)
    build = [sys.executable, "-m", "build", "--outdir", str(folder)]
    here = [*build, "--sdist", "--no-isolation", str(source)]
    subprocess.run(here, check=True, env=there, stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob("*.tar.gz")
    lacking(packed(sdist), want, sdist.name)
    # the wheel in isolation, as a user's pip builds it: with what pyproject.toml requires, alone
    apart = [*build, "--wheel", str(unpacked(sdist))]
    subprocess.run(apart, check=True, env=there, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    check_wheel(wheel, want)
    python = environment(folder / "env")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    there["FASTKD_BACKEND"] = "cpu"
    # -I: neither the folder nor PYTHONPATH is searched
    subprocess.run([str(python), "-I", "-c", USE], check=True, env=there, cwd=folder)


if __name__ == "__main__":
    main()
