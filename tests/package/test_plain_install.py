"""Without the extras: what needs one says so, and how to get it; what does not, runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from common import run_python

from fastkd import distill
from fastkd.distill import logging, serialization
from fastkd.teachers import store

# Runs CALLS where these modules are not found, and prints what each did: "ok", what it gave, or
# the error; "warned" is what the call has said.
SCRIPT = """
import json, sys, warnings
from pathlib import Path

absent, folder, names = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in absent:
            return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(x) if hasattr(x, "find_spec") else x for x in sys.meta_path]
import torch

torch.tensor([1.0]).sum()  # what torch itself says of NumPy, it says now
with warnings.catch_warnings(record=True) as at_import:
    warnings.simplefilter("always")
    import fastkd
    from fastkd import distill
    from fastkd.teachers import store as cache


def net():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))


torch.manual_seed(0)
x, y = torch.randn(8, 4), torch.arange(8) % 3
data = [(x, y)] * 2


def train(**options):
    return distill.train(net(), data, [distill.hard(), distill.soft()], teacher=net(), **options)


def imported(name):
    def get():
        __import__(f"fastkd.integrations.{name}")
    return get


def patched():
    import fastkd.integrations.trl
    fastkd.integrations.trl.patch(type("T", (), {"generalized_jsd_loss": print}))


def demo():
    from fastkd.demo import run
    run(None, preset="tiny", out=folder / "demo")


def recipes():
    from fastkd.recipes import runner
    runner.run(["own-teacher"], seeds=1, size=0.003, jobs=1)


def pseudo():
    from fastkd.recipes.pseudo_labels import pseudo_labels
    pseudo_labels(net(), data, clusters=2)


def automatic():
    from fastkd.recipes.workflow import tuned
    tuned(0, 0.01)


def plotted():
    from fastkd.recipes import runner
    runner.plot({"rows": []}, folder / "x.png")


CALLS = {
    "loss": lambda: fastkd.kl_div(x.clone().requires_grad_(), x.flip(0)).backward(),
    "train": train,
    "train again": train,
    "checkpoint": lambda: train(checkpoint=distill.Checkpoints(folder / "run", every=1)),
    "save": lambda: distill.save(net(), folder / "net.safetensors"),
    "load": lambda: distill.load(net(), folder / "net.safetensors"),
    "capture": lambda: cache.capture(net(), data, folder / "cache", vocab_size=3, k=2),
    "reader": lambda: cache.Reader(folder / "cache").verify(progress=True),
    "evaluate": lambda: distill.evaluate(net(), data),
    "report": lambda: distill.report(net(), data),
    "pseudo_labels": pseudo,
    "automatic": automatic,
    "export": lambda: distill.export(net(), x, folder / "out"),
    "onnx": lambda: distill.export(net(), x, folder / "onnx", formats=("onnx",)),
    "lightning": imported("lightning"),
    "transformers": imported("transformers"),
    "trl": patched,
    "demo": demo,
    "recipes": recipes,
    "plot": plotted,
}


if __name__ == "__main__":  # recipes start processes
    told = {"import": {"did": "ok", "warned": [str(w.message) for w in at_import]}}
    for name in names or CALLS:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                CALLS[name]()
                did = "ok"
            except BaseException as error:
                did = f"{type(error).__name__}: {error}"
        told[name] = {"did": did, "warned": [str(w.message) for w in said]}
    print("TOLD" + json.dumps(told))
"""


GET = re.compile(
    r"^ImportError: (?P<user>\S.*) needs (?P<module>[\w.]+)( \(No module named '[\w.]+'\))?: pip "
    r"install '\.\[(?P<extra>\w+)\]' in fastkd's checkout, or pip install (?P<package>[\w-]+)"
)
# what the extras bring
MODULES = [
    *("sklearn", "scipy", "safetensors", "matplotlib", "transformers", "accelerate", "lightning"),
    *("pytorch_lightning", "trl", "tokenizers", "optuna", "onnx", "onnxscript", "tqdm", "pyarrow"),
]
# without all of these: the extra and the package that are named; None where it runs
NEEDED: dict[str, tuple[str, str] | None] = {
    **dict.fromkeys(("import", "loss", "train", "train again", "evaluate"), None),
    "checkpoint": ("train", "numpy"),
    **dict.fromkeys(("save", "load", "export"), ("train", "safetensors")),
    "capture": ("store", "pyarrow"),
    **dict.fromkeys(("report", "pseudo_labels", "recipes"), ("train", "scikit-learn")),
    "plot": ("train", "matplotlib"),
    "automatic": ("tune", "optuna"),
    "onnx": ("onnx", "onnx"),
    "lightning": ("lightning", "lightning"),
    "transformers": ("hf", "transformers"),
    "trl": ("trl", "trl"),
    "demo": ("demo", "transformers"),
}
NO_BAR = ["no bar is shown: progress=True needs tqdm.auto: pip install '.[train]' in fastkd's"]
NO_BAR = [f"{NO_BAR[0]} checkout, or pip install tqdm"]


def _without(absent: list[str], tmp_path: Path, *names: str) -> dict[str, Any]:
    """What each call did, and what it warned of, where these are not installed."""
    file = tmp_path / "plain.py"
    file.write_text(SCRIPT)
    ran = run_python(str(file), json.dumps(absent), str(tmp_path), json.dumps(names))
    assert "TOLD" in ran.stdout, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout.partition("TOLD")[2])
    return told


def test_a_plain_install_runs_or_says_what_to_install(tmp_path: Path) -> None:
    told = _without(["numpy", *MODULES], tmp_path, *(name for name in NEEDED if name != "import"))
    for name, needs in NEEDED.items():
        did = told[name]["did"]
        if needs is None:
            assert did == "ok", name
            continue
        found = GET.match(did)
        assert found and (found["extra"], found["package"]) == needs, (name, did)
        assert len(did) < 500
    assert told["import"]["warned"] == [] and told["loss"]["warned"] == []
    # the first of them all says it, once
    assert told["train"]["warned"] == NO_BAR
    assert told["train again"]["warned"] == []


def test_without_numpy_alone(tmp_path: Path) -> None:
    """What is there and needs what is not names the latter; nothing is torch's "not available"."""
    names = ("loss", "train", "checkpoint", "save", "capture", "report", "pseudo_labels")
    told = _without(["numpy"], tmp_path, *names, "export")
    assert told["loss"]["did"] == told["train"]["did"] == "ok"
    for name in (*names[2:], "export"):
        found = GET.match(told[name]["did"])
        assert found and found["package"] == "numpy", told[name]


def test_without_tqdm_alone(tmp_path: Path) -> None:
    """Whatever shows a bar goes on without one."""
    names = ("capture", "reader", "train", *(["recipes"] if find_spec("sklearn") else []))
    told = _without(["tqdm"], tmp_path, *names)
    assert [told[name]["did"] for name in names] == ["ok"] * len(names)
    assert [x for name in names for x in told[name]["warned"] if "bar" in x] == NO_BAR


def test_a_hidden_bar_is_called_like_one() -> None:
    with logging.progress_bar(False, [1, 2], unit="x") as bar:
        assert list(bar) == [1, 2]
        bar.update(2)
        bar.set_postfix(a=1)
        bar.set_postfix_str("a", refresh=False)
        bar.close()
    assert list(logging.progress_bar(False)) == []


def test_a_module_that_is_there_and_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("from math import nonsense")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"x needs broken_module \(cannot import name 'nonsense'"):
        serialization.needed("broken_module", "x")


def test_messages_name_no_package_that_is_on_no_index() -> None:
    """pip install fastkd[...] finds nothing: fastkd is installed from its checkout."""
    root = Path(distill.__file__).parents[2]
    looked = [*(root / "fastkd").rglob("*.py"), root / "README.md"]
    for file in filter(Path.exists, looked):
        assert not re.search(r"pip install\W+fastkd", file.read_text()), file


# Runs each command line in a fork of a process with the package imported; prints exit statuses.
FORKS = """
import gc, json, os, runpy, sys

import fastkd.distill, fastkd.recipes.runner, fastkd.scan, fastkd.teachers.store

gc.freeze()  # else each child goes through all that torch has made, and copies its pages
statuses = []
for number, words in enumerate(json.loads(os.environ["COMMANDS"])):
    child = os.fork()
    if child == 0:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(os.open(f"{os.environ['SAID']}/said-{number}", os.O_WRONLY | os.O_CREAT), 2)
        break
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    print(json.dumps(statuses), flush=True)
    os._exit(0)
sys.argv[1:] = words
runpy.run_module("fastkd", run_name="__main__", alter_sys=True)
"""
COMMANDS = [
    *(["info"], ["info", "--json"], ["recipes"], ["scan", "{file}"], ["scan", "{file}", "--json"]),
    *(["cache", what, "{cache}"] for what in ("info", "merge", "verify")),
    ["--help"],
]


def test_output_that_nobody_reads_ends_in_silence(tmp_path: Path) -> None:
    """As with `python -m fastkd recipes | head`, once head has gone."""
    pytest.importorskip("pyarrow")
    file, folder = tmp_path / "loss.py", tmp_path / "cache"
    file.write_text("import torch.nn.functional as F\nF.kl_div(F.log_softmax(a, -1), b)\n")
    pairs = [(torch.randn(4, 3), torch.arange(4) % 3)]
    store.capture(torch.nn.Linear(3, 3), pairs, folder, vocab_size=3, k=2, progress=False)
    commands = [[x.format(file=file, cache=folder) for x in words] for words in COMMANDS]
    ran = ranks.python(FORKS, COMMANDS=json.dumps(commands), SAID=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    for number, (words, status) in enumerate(zip(COMMANDS, json.loads(ran.stdout), strict=True)):
        said = (tmp_path / f"said-{number}").read_text()
        assert "Traceback" not in said and "Broken" not in said, words
        # argparse leaves out a help that it cannot write
        assert status == (0 if words == ["--help"] else 141), words


def test_a_process_whose_output_nobody_reads(tmp_path: Path) -> None:
    """The same of a whole one, to its end."""
    reader, writer = os.pipe()
    os.close(reader)
    root = str(Path(distill.__file__).parents[2])
    with os.fdopen(writer, "wb") as nobody:
        ran = subprocess.run(
            [sys.executable, "-m", "fastkd", "info"],
            env={**os.environ, "PYTHONPATH": root},
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert "Traceback" not in ran.stderr and "Broken" not in ran.stderr and ran.returncode == 141
