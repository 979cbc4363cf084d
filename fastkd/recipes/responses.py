"""Other losses of logits than soft targets, on the 100 images whose labels the student has."""

from __future__ import annotations

from fastkd import distill

from .recipe import Figures, Gain, Recipe
from .soft_targets import Bench
from .training import held_out


def run(seed: int, size: float) -> Figures:
    bench = Bench(seed, size)
    hard, response = distill.hard(0.1), distill.response
    return {
        "teacher": held_out(bench.teacher, bench.data),
        "hard labels": bench.same(distill.hard()),
        "dkd": bench.same(hard, response(distill.dkd, 0.9)),
        "nkd": bench.same(hard, response(distill.nkd, temperature=4.0)),
        "z-score": bench.same(hard, response(distill.zscore, 9.0)),
        "dist": bench.same(hard, response(distill.dist, 2.0, temperature=4.0)),
    }


RECIPES = (
    Recipe(
        name="responses",
        about="decoupled, normalised, standardised and correlated logits of 100 labelled images",
        paper="Zhao et al. 2022, arXiv 2203.08679; Yang et al. 2023, arXiv 2303.13005; Sun et al. "
        "2024, arXiv 2403.01427; Huang et al. 2022, arXiv 2205.10536",
        run=run,
        gains=(
            *(
                Gain(name, "hard labels", 2.0, seeds_improved=0.9)
                for name in ("dkd", "nkd", "z-score")
            ),
            Gain("dist", "hard labels", 1.0, seeds_improved=0.9),
        ),
        seeds=10,
    ),
)
