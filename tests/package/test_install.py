"""What a build takes along, and what it says where it cannot compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import sdist

pytest.importorskip("pybind11", reason="setup.py imports it")
pytest.importorskip("setuptools", reason="setup.py imports it")

# recent versions of setuptools take these files along unasked
EXCLUDED = "[tool.setuptools.exclude-package-data]"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What an sdist is made of, with nothing that was built."""
    return sdist.copy(tmp_path / "source")


def _setup(source: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    there = {name: x for name, x in os.environ.items() if name != "FASTKD_REQUIRE_CPU"}
    return subprocess.run(
        [sys.executable, "setup.py", *words],
        cwd=source,
        env={**there, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _sdist(source: Path) -> Path:
    ran = _setup(source, "sdist", "--dist-dir", "made")
    assert ran.returncode == 0, ran.stderr
    (found,) = (source / "made").iterdir()
    return found


def test_sdist_has_the_package_and_all_that_the_sources_include(source: Path) -> None:
    want = sdist.files(source)
    assert {"fastkd/py.typed", "fastkd/_C.pyi", "fastkd/backends/gpu/rows.py", "LICENSE"} <= want
    new = source / "csrc" / "later.hpp"  # a suffix that nobody has thought of
    new.write_text("#pragma once\n")
    isa = source / "csrc" / "isa_baseline.cpp"
    isa.write_text(isa.read_text() + '#include "later.hpp"\n')
    have = sdist.packed(_sdist(source))
    assert want <= have
    included = {
        f"csrc/{name}"
        for file in (source / "csrc").iterdir()
        for name in re.findall(r'^\s*#\s*include\s+"(.+?)"', file.read_text(), re.MULTILINE)
    }
    assert {"csrc/vocab_parallel.h", "csrc/kernels.inl", "csrc/later.hpp"} <= included <= have
    assert {f"csrc/{name}" for name in sdist.files(source / "csrc")} <= have


@pytest.mark.parametrize(
    ("file", "old", "new", "lost"),
    [
        ("setup.py", 'glob("csrc/*")', 'glob("csrc/[!v]*")', "csrc/vocab_parallel.h"),
        ("pyproject.toml", "[tool.setuptools.package-data]", EXCLUDED, "fastkd/py.typed"),
        (
            "pyproject.toml",
            '["fastkd*"]',
            '["fastkd", "fastkd.[!b]*"]',
            "fastkd/backends/gpu/rows.py",
        ),
    ],
)
def test_the_gate_sees_what_an_sdist_lacks(
    source: Path, file: str, old: str, new: str, lost: str
) -> None:
    want, text = sdist.files(source), (source / file).read_text()
    assert old in text
    (source / file).write_text(text.replace(old, new))
    made = _sdist(source)
    with pytest.raises(SystemExit, match=f"fastkd-.*: got no .*{re.escape(lost)}"):
        sdist.lacking(sdist.packed(made), want, made.name)


def test_a_build_without_a_compiler_says_so_and_goes_on(source: Path) -> None:
    ran = _setup(source, "build", "--build-lib", "lib", CXX="/bin/false", CC="/bin/false")
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if line.startswith("fastkd: WITHOUT")]
    assert len(said) == 1 and len(said[0]) < 500
    for part in ("/bin/false", "C++17", "reference", "FASTKD_REQUIRE_CPU=1"):
        assert part in said[0]
    assert (source / "lib" / "fastkd" / "py.typed").exists()
    assert not list((source / "lib").rglob("_C.*.so"))


def test_a_build_that_requires_the_kernels_fails(source: Path) -> None:
    failing = {"CXX": "/bin/false", "CC": "/bin/false", "FASTKD_REQUIRE_CPU": "1"}
    ran = _setup(source, "build", **failing)
    assert ran.returncode != 0 and "/bin/false" in ran.stderr


def test_an_earlier_extension_does_not_stand_in_for_a_failed_one(source: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    old = source / "lib" / "fastkd" / f"_C{suffix}"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (0, 0))  # older than the sources, as after an edit
    ran = _setup(source, "build", "--build-lib", "lib", CXX="/bin/false", CC="/bin/false")
    assert ran.returncode == 0, ran.stderr
    assert not old.exists()
