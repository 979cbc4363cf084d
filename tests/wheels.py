"""The release's files in dist/, and each wheel tried: `python tests/wheels.py PYTHON...`.

One sdist, from it one wheel for each interpreter, SHA256SUMS of them all. Each wheel is installed
alone into an environment of its own. `--torch` installs torch there too, as a user's pip would, and
runs the first example of README.md; without torch, the extension is loaded and asked for its
instruction sets. `--use` does that part alone, in the environment that runs this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
SETTING = """
import torch
import torch.nn.functional as F
import fastkd
T = 2.0
student, teacher = torch.randn(8, 1000, requires_grad=True), torch.randn(8, 1000)
"""


def use() -> None:
    """Runs what README.md shows first, before and after, and compares; or loads the extension."""
    found = importlib.util.find_spec("fastkd")
    assert found and found.origin and ROOT not in Path(found.origin).parents, found
    if importlib.util.find_spec("torch") is None:
        beside = Path(found.origin).parent.glob("_C*")
        (binary,) = (file for file in beside if file.suffix in (".so", ".pyd"))
        spec = importlib.util.spec_from_file_location("fastkd._C", binary)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(f"{binary.name}: {module.isas()}; no torch here")
        return
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    before, after = block.split("# after", 1)
    values: list[float] = []
    for text in (before, "# after" + after):
        names: dict[str, object] = {}
        exec("import torch\ntorch.manual_seed(0)" + SETTING + text, names)
        values.append(float(names["loss"]))  # type: ignore[arg-type]
        info = names["fastkd"].info()  # type: ignore[attr-defined]
    assert abs(values[0] - values[1]) <= 1e-5 * abs(values[0]), values
    assert info["cpu"], info  # else the reference ran
    print(f"{sys.version.split()[0]}, torch {info['torch']}: {values[1]:.6f} both ways, {info}")


def run(*command: object, **environment: str) -> None:
    subprocess.run([*map(str, command)], check=True, env={**os.environ, **environment})


def build(pythons: list[str]) -> list[tuple[str, Path]]:
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    wheels = []
    for python in pythons:
        before = set(DIST.glob("*.whl"))
        words = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", DIST, sdist)
        run(python, *words, FASTKD_REQUIRE_CPU="1")
        (wheel,) = set(DIST.glob("*.whl")) - before
        wheels.append((python, wheel))
    files = sorted(DIST.iterdir())
    lines = [f"{hashlib.sha256(x.read_bytes()).hexdigest()}  {x.name}\n" for x in files]
    (DIST / "SHA256SUMS").write_text("".join(lines))
    return wheels


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    parser.add_argument(
        "--torch", metavar="SPEC", help="torch to install beside, e.g. torch==2.13.0"
    )
    parser.add_argument("--use", action="store_true")
    options = parser.parse_args()
    if options.use:
        use()
        return 0
    for python, wheel in build(options.pythons or [sys.executable]):
        with tempfile.TemporaryDirectory() as folder:
            run(python, "-m", "venv", folder)
            inside = Path(folder) / "bin" / "python"
            alone = [] if options.torch else ["--no-deps"]
            run(
                inside,
                "-m",
                "pip",
                "install",
                "--quiet",
                *alone,
                *filter(None, [options.torch]),
                wheel,
            )
            run(inside, ROOT / "tests" / "wheels.py", "--use")
    return 0


if __name__ == "__main__":
    sys.exit(main())
