"""The model of the memory traffic: what must hold whatever the card, and a case by hand."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cards import BY_ARCH, CARDS, MIB
from bench.traffic import (
    EXCHANGE,
    ITEMSIZE,
    KEPT,
    MERGE,
    SCHEMES,
    VOCABS,
    Program,
    hits,
    markdown,
    predict,
    traffic,
)

LIGHT = Program(registers=64, threads=256, special=1, instructions=8)
HEAVY = LIGHT._replace(instructions=400)

each_scheme = pytest.mark.parametrize("scheme", list(SCHEMES))
each_card = pytest.mark.parametrize("card", list(CARDS))


@each_card
@each_scheme
@pytest.mark.parametrize("dtype", list(ITEMSIZE))
@pytest.mark.parametrize("program", [LIGHT, HEAVY], ids=["light", "heavy"])
def test_never_below_the_floor_and_monotone(
    card: str, scheme: str, dtype: str, program: Program
) -> None:
    found = [predict(CARDS[card], scheme, program, vocab, dtype) for vocab in VOCABS]
    for p in found:
        assert p.bytes >= p.floor_bytes and 0 < p.share <= 1 and 0 <= p.hits <= 1
        assert not p.measured
    for narrow, wide in itertools.pairwise(found):
        assert narrow.bytes <= wide.bytes and narrow.ms < wide.ms and narrow.share >= wide.share


@each_scheme
def test_the_floor_where_everything_fits(scheme: str) -> None:
    """What stays in the cache is read from memory once in each launch."""
    p = predict(CARDS["H200"], scheme, LIGHT, 100, "bf16")
    again = {"kl, recomputed": 2 * 2}.get(scheme, 0)
    assert p.hits == 1 and p.bytes == p.floor_bytes + again


def test_the_floor_by_hand() -> None:
    """8192 rows of 32 000 columns of bfloat16: 3 streams are 1.57 GB, 0.366 ms at 4.3 TB/s."""
    h200 = CARDS["H200"]._replace(cache=1000 * MIB)
    p = predict(h200, "kl", LIGHT, 32_000, "bf16")
    assert p.bytes == 6 and p.share == 1 and p.bound == "memory"
    assert p.ms == pytest.approx(3 * 2 * 8192 * 32_000 / 4.3e12 * 1e3)
    assert p.ms == pytest.approx(0.366, abs=5e-4)


@pytest.mark.parametrize(
    ("scheme", "cold"), [("kl", 10), ("js", 14), ("kl, recomputed", 10), ("top-k", 6)]
)
def test_without_a_cache_every_sweep_reads_memory(scheme: str, cold: float) -> None:
    assert traffic(SCHEMES[scheme], 0.0, 2) == cold


def test_what_stays_in_the_cache() -> None:
    """Half of what is kept, shared by twice as many rows as there is room for."""
    card = CARDS["H200"]
    rows = 64
    row_bytes = int(2 * KEPT * card.cache / rows)
    assert hits(card, rows, row_bytes) == pytest.approx(0.5)
    assert hits(card, 1, 4) == 1


def test_fewer_rows_in_flight_hit_more() -> None:
    """A cluster of blocks, a program of more threads, a batch of few rows."""
    card, vocab = CARDS["H200"], 128_256
    alone = predict(card, "kl", LIGHT, vocab, "bf16")
    cluster = predict(card, "kl", LIGHT._replace(ctas=4), vocab, "bf16")
    large = predict(card, "kl", LIGHT._replace(threads=1024), vocab, "bf16")
    few = predict(card, "kl", LIGHT, vocab, "bf16", rows=8)
    assert cluster.rows_in_flight * 4 == large.rows_in_flight * 4 == alone.rows_in_flight
    assert alone.bytes > cluster.bytes == large.bytes > few.bytes == 6


def test_a_team_divides_the_rows_in_flight_and_waits() -> None:
    card, vocab = CARDS["H200"], 128_256
    alone = predict(card, "kl", LIGHT, vocab, "bf16")
    team = predict(card, "kl", LIGHT._replace(parts=8), vocab, "bf16")
    assert team.rows_in_flight == alone.rows_in_flight // 8 and team.bytes == 6 < alone.bytes
    # by hand: 66 rows of 128 256 columns at 6 bytes are 11.8 us, of which a merge takes 2
    assert team.waits == pytest.approx((MERGE + EXCHANGE) / (66 * vocab * 6 / card.copy))
    assert 0 < alone.waits < team.waits < 0.25
    assert predict(card, "js", LIGHT._replace(parts=8), vocab, "bf16").waits > team.waits


def test_the_package_shares_rows_by_the_same_share_of_the_cache() -> None:
    team = pytest.importorskip("fastkd.backends.gpu.cooperative")
    assert team.KEPT == KEPT


def test_arithmetic_bounds_the_time() -> None:
    p = predict(CARDS["H200"], "js", HEAVY, 32_000, "bf16")
    assert p.bound == "instructions"
    assert p.ms == pytest.approx(8192 * 32_000 * 400 / (132 * 128 * 1.755e9) * 1e3)


@each_card
def test_programs_that_share_a_multiprocessor(card: str) -> None:
    of = CARDS[card]
    assert of.resident(32, 256) >= of.resident(64, 256) >= of.resident(255, 256) >= 1
    assert of.resident(32, 1024) * 1024 <= of.threads
    assert BY_ARCH[of.arch] is of
    assert of.copy < of.peak


def test_registers_of_a_multiprocessor() -> None:
    """65536 registers: 61 are held as 64 by each of 256 threads."""
    assert CARDS["H200"].resident(61, 256) == 4
    assert CARDS["H200"].resident(65, 256) == 3
    # 512 of a lane: 4 SIMDs with 5 waves of 64 lanes each
    assert CARDS["MI300X"].resident(100, 256) == 4


def test_the_table_says_that_it_is_a_model() -> None:
    text = markdown([predict(CARDS["A100"], "kl", LIGHT, 32_000, "bf16")])
    assert text.startswith("A MODEL, not a measurement") and "predicted ms" in text


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "traffic.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.traffic", "--json", str(out)],
        cwd=Path(__file__).parent.parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["model"] is True and document["measured"] is False
    found = {(p["scheme"], p["vocab"]): p for p in document["predictions"]}
    assert set(found) == {(scheme, vocab) for scheme in SCHEMES for vocab in VOCABS}
    assert all(6 <= p["bytes"] <= 10 for (name, _), p in found.items() if name == "kl")


def test_an_unknown_card_says_so() -> None:
    from bench.traffic import main

    with pytest.raises(SystemExit):
        main(["--cards", "H2"])
