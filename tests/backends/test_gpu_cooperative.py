"""Programs that share a row in one launch: the tests of `test_gpu_split`, and of their waiting.

Without a GPU the interpreter's programs take turns, in an order that comes from a seed.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported: no import before

from oracle import assert_as_good_as_torch, differentiate

import fastkd

pytest.importorskip("triton")
from test_gpu_split import (  # noqa: F401  the same tests under this file's fixtures
    each,
    launches,
    make,
    test_a_row_of_nothing_and_a_row_of_nan,
    test_columns_past_the_vocabulary,
    test_hard_labels,
    test_identical_logits_give_exactly_nothing,
    test_impossible_columns,
    test_in_place,
    test_kl_of_a_probability_that_underflows_is_nothing,
    test_outputs_of_rows,
    test_rows_left_out_are_not_read,
    test_the_bits_are_the_same_from_run_to_run,
    test_values_and_gradients,
)
from together import together  # noqa: F401

from fastkd.backends import base
from fastkd.backends.gpu import cooperative, launch, proof, split_rows

ON_GPU = torch.cuda.is_available()
HOLDS, RESIDENT = cooperative.Capacity(132, 50 << 20), 3
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("error:.*computes each wide row"),
]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """The backend in force, with tiles of 128 columns and programs that run together."""
    if not ON_GPU:
        monkeypatch.setattr(cooperative, "HOST", HOLDS)
        request.getfixturevalue("together")(cooperative.cooperative_kernel, resident=8)
    with fastkd.use_backend("gpu"):
        yield launches(monkeypatch)


@pytest.fixture
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many programs to a row, whatever its size: some of them may be left without a column."""
    number = int(getattr(request, "param", 3))
    # where the device has room for cooperation at all
    monkeypatch.setattr(
        cooperative, "programs_per_row", lambda *of: 1 if of[-1] is None else number
    )
    return number


@pytest.fixture
def steps() -> Any:
    return lambda divergence: ["cooperative_kernel"]


# ---- how many


def shared(rows: int, vocab: int, itemsize: int = 2, holds: cooperative.Capacity = HOLDS) -> int:
    columns = 8192 // itemsize
    return cooperative.programs_per_row(rows, vocab, 2 * itemsize * vocab, columns, RESIDENT, holds)


def test_the_rows_in_flight_fit_the_cache() -> None:
    for vocab in (32_000, 50_257, 128_256, 151_936, 256_000):
        for itemsize in (2, 4):
            number = shared(8192, vocab, itemsize)
            rows = RESIDENT * HOLDS.processors / number
            assert rows * 2 * itemsize * vocab <= cooperative.KEPT * HOLDS.cache
            assert vocab // number >= split_rows.TILES * 8192 // itemsize


def test_rows_that_fit_by_themselves_are_not_shared() -> None:
    assert shared(8192, 10_000) == shared(8192, 16_000) == 1
    assert shared(8192, 128_256, holds=cooperative.Capacity(132, 1 << 30)) == 1


def test_a_few_rows_fill_the_device() -> None:
    assert shared(64, 32_000) == 3 and shared(8192, 32_000) == 2
    assert shared(1, 128_256) == 15 and shared(1, 10**7) == cooperative.MOST


def test_the_parts_share_the_tiles_evenly() -> None:
    for vocab in (32_000, 50_257, 128_256, 151_936, 256_000):
        number, tiles = shared(8192, vocab), -(-vocab // 4096)
        assert -(-tiles // number) * number <= 1.2 * tiles


def test_only_where_it_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cooperative.programs_per_row(8192, 10**6, 10**7, 4096, RESIDENT, None) == 1
    monkeypatch.setattr(cooperative, "HOST", None)
    assert cooperative.capacity(torch.device("cpu"), "default") is None
    assert cooperative.capacity(torch.device("cuda", 0), "gfx942") is None
    # few places: a row's programs must never fill them
    assert shared(1, 128_256, holds=cooperative.Capacity(3, 1 << 20)) == 1


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, number in (("0", 1), ("1", 1), ("5", 5), ("99", cooperative.MOST)):
        monkeypatch.setenv(cooperative.VARIABLE, given)
        assert shared(8192, 128_256) == number
    monkeypatch.setenv(cooperative.VARIABLE, "many")
    with pytest.raises(ValueError, match=r"FASTKD_GPU_COOPERATIVE.*'many'"):
        shared(8192, 128_256)


# ---- waiting


@pytest.mark.skipif(ON_GPU, reason="the order of a GPU's programs is its own")
@pytest.mark.interpreted(6)
@pytest.mark.parametrize("name", ["kl", "js"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_gives_the_same_bits(
    name: str,
    seed: int,
    parts: int,
    together: Any,  # noqa: F811
) -> None:
    """Also of an in-place gradient, and with hardly more room than a row's programs take."""
    student, teacher, labels = make(2, 400)
    labels[1] = -100
    call = dict(divergence=name, alpha=0.4, temperature=2.0)
    with fastkd.use_backend("gpu"):
        expected = differentiate(fastkd.distillation_loss, student, teacher, labels, **call)
        turns = together(cooperative.cooperative_kernel, seed=seed, resident=parts + seed % 2)
        memory = student.clone().requires_grad_()
        loss = fastkd.distillation_loss(memory * 1.0, teacher, labels, inplace=True, **call)
        loss.backward()
    assert turns.switches > 2 * parts and torch.equal(loss, expected.value)
    assert torch.equal(memory.grad, expected.student)


def test_a_number_that_never_comes_is_nan(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:  # which polls for some seconds
        monkeypatch.setattr(cooperative, "PATIENCE", cooperative.tl.constexpr(3))
    student, teacher, _ = make(2, 500)
    # the last part of the last row draws no ticket
    real_launch = launch.launch

    def one_less(kernel: Any, programs: int, *rest: Any) -> None:
        real_launch(kernel, programs - 1, *rest)

    monkeypatch.setattr(launch, "launch", one_less)
    out = differentiate(fastkd.kl_div, student, teacher, reduction="none")
    assert out.value[0].isfinite() and out.value[1].isnan()
    assert out.student[0].isfinite().all() and out.student[1, :256].isnan().all()


def test_a_launch_that_fails_is_said_once(
    parts: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the row kernel does the work from there on."""
    monkeypatch.setattr(proof, "_verdicts", {})
    real = launch.launch

    def fail(kernel: Any, *rest: Any) -> None:
        if kernel is cooperative.cooperative_kernel:
            raise RuntimeError("fastkd: cooperative_kernel could not be launched")
        real(kernel, *rest)

    monkeypatch.setattr(launch, "launch", fail)
    student, teacher, labels = make(2, 500)
    with pytest.warns(RuntimeWarning) as said:
        for _ in range(2):
            assert_as_good_as_torch(student, teacher, labels, divergence=fastkd.divergences["kl"])
    texts = [str(w.message) for w in said if "computes each wide row" in str(w.message)]
    assert len(texts) == 1 and "could not be launched" in texts[0]
    assert list(proof._verdicts) == [student.device]
    assert set(launched) == {"fused_kernel", "total_kernel"}  # none cooperated


# ---- safe until proven


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that has to prove itself; a function: the kernels that a loss starts."""
    monkeypatch.setattr(proof, "HOST", None)
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "VOCAB", 300)
    monkeypatch.setattr(proof, "JS", proof.JS._replace(vocab=300, classes=300))
    student, teacher, _ = make(2, 260)

    def started(launched: list[str]) -> list[str]:
        launched.clear()
        assert_as_good_as_torch(student, teacher, divergence=fastkd.divergences["js"])
        return [x for x in launched if x != "total_kernel"]

    return started


def test_a_device_proves_itself_once(parts: int, launched: list[str], untried: Any) -> None:
    before = torch.get_rng_state()
    first, shared = untried(launched), "cooperative_kernel"
    assert first[:4] == ["fused_kernel", shared, shared, shared] and set(first[4:]) == {shared}
    assert set(untried(launched)) == {shared}
    assert list(proof._verdicts.values()) == [""] and torch.equal(before, torch.get_rng_state())


def _wrong(kernel: Any, programs: int, args: dict[str, Any], *rest: Any) -> None:
    launch.launch.real(kernel, programs, args, *rest)
    args["rows"].loss.add_(1e-2)


def _raising(kernel: Any, *rest: Any) -> None:
    raise ValueError("planted")


def _another_time(kernel: Any, programs: int, args: dict[str, Any], *rest: Any) -> None:
    """The numbers of one run in a row differ in their last bit."""
    launch.launch.real(kernel, programs, args, *rest)
    _another_time.turns += 1
    args["rows"].loss.mul_(1 + _another_time.turns * 1e-6)


_another_time.turns = 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (_wrong, "came out otherwise"),
        (_another_time, "came out otherwise"),
        (_raising, "ValueError: planted"),
        ("slow", "took 5.0 seconds"),
    ],
)
def test_a_device_that_fails_is_refused_with_one_warning(
    fault: Any, says: str, parts: int, launched: list[str], untried: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = launch.launch

    def planted(kernel: Any, *rest: Any) -> None:
        broken = kernel is cooperative.cooperative_kernel and fault != "slow"
        (fault if broken else real)(kernel, *rest)

    planted.real = real  # type: ignore[attr-defined]
    monkeypatch.setattr(launch, "launch", planted)
    if fault == "slow":
        monkeypatch.setattr(proof, "timed", lambda device, run: (run(), 5.0))
    with pytest.warns(RuntimeWarning, match=says) as said:
        untried(launched)  # as good as torch all the same
        assert "cooperative_kernel" not in untried(launched)
    assert sum("computes each wide row" in str(w.message) for w in said) == 1
    (why,) = proof._verdicts.values()
    assert says in why and says in proof.state(next(iter(proof._verdicts)))


@pytest.mark.parametrize("where", ["_capturing", "is_compiling"])
def test_nothing_is_tried_within_a_capture(
    where: str, parts: int, launched: list[str], untried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as within:
        of: Any = proof if where == "_capturing" else torch.compiler
        within.setattr(of, where, lambda *device: True)
        with fastkd.use_backend("gpu"):
            row = torch.randn(1, 2, 500)
            launch.FusedPasses().fused(row, row, proof.JS, base.Rows(), None)
    assert launched == ["fused_kernel"] and proof._verdicts == {}
    assert "cooperative_kernel" in untried(launched)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NV_SANITIZER_INJECTION_PORT_BASE", "49152"),
        ("CUDA_INJECTION64_PATH", "/opt/cuda/compute-sanitizer/libsanitizer-collection.so"),
        ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "50"),
        ("CUDA_MPS_PIPE_DIRECTORY", "/run/mps"),
        ("", ""),
    ],
)
def test_tools_and_neighbours_are_refused(
    name: str, value: str, parts: int, launched: list[str], untried: Any,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any,
) -> None:  # fmt: skip
    """Under a profiler, which sets a variable of the same name, programs do cooperate."""
    monkeypatch.setenv("CUDA_INJECTION64_PATH", "/opt/nsight/libToolsInjection64.so")
    if name:
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr(proof, "MPS_PIPE", tmp_path)
    proof.hindrance.cache_clear()
    assert "cooperative_kernel" not in untried(launched)
    assert proof.state(torch.device("cuda", 0)).startswith(("compute-sanitizer", "a multi-process"))
    monkeypatch.undo()
    proof.hindrance.cache_clear()
    assert proof.hindrance() == ""


# ---- a GPU's own


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> list[str]:
    """The tiles and numbers of programs of the GPU, whose launches are still noted."""
    note = launch.launch
    monkeypatch.undo()
    monkeypatch.setattr(launch, "launch", note)
    return launched


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize(("rows", "vocab"), [(64, 128_256), (600, 128_256), (300, 50_257)])
@pytest.mark.parametrize("name", ["kl", "js"])
def test_wide_rows_on_a_gpu(name: str, rows: int, vocab: int, real: list[str]) -> None:
    """As one program to a row has them, again and again, in a graph and beside another stream."""
    device = torch.device("cuda", torch.cuda.current_device())
    if cooperative.capacity(device, launch.gpu_info(device).arch) is None:
        pytest.skip("this GPU does not cooperate")
    student, teacher, labels = make(rows, vocab, torch.bfloat16)
    call = dict(divergence=name, alpha=0.4, temperature=2.0, reduction="none")

    def step() -> Any:
        with fastkd.use_backend("gpu"):
            return differentiate(fastkd.distillation_loss, student, teacher, labels, **call)

    first = step()
    assert "cooperative_kernel" in real and first.student is not None
    with pytest.MonkeyPatch.context() as alone:
        alone.setenv(cooperative.VARIABLE, "0")
        alone.setattr(split_rows, "programs_per_row", lambda *shape: 1)
        other = step()
    assert real[-1] == "fused_kernel"
    torch.testing.assert_close(first.value, other.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.student, other.student, rtol=1e-2, atol=1e-6)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    found = []
    for turn in range(20):
        with torch.cuda.stream(side if turn % 2 else torch.cuda.current_stream()):
            found.append(step())
    torch.cuda.synchronize()
    for again in found:
        assert torch.equal(again.value, first.value) and torch.equal(again.student, first.student)

    out = torch.empty_like(first.value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), fastkd.use_backend("gpu"):
        out.copy_(fastkd.distillation_loss(student, teacher, labels, **call))
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, first.value)
