"""The case families: a file declares cases, providers and what is counted.

A new family is one file with a subclass of `bench.harness.family.Family`, and one line here.
"""

from __future__ import annotations

import importlib

from bench.harness.family import Family

# name on the command line -> module; imported when it is asked for (one needs transformers)
FAMILIES = {
    "losses": "losses",
    "linear": "linear",
    "responses": "responses",
    "trainer": "trainer",
    "integrations": "integrations",
    "store": "store",
    "store-scale": "store_scale",
    "store-stream": "store_stream",
    "vocab-parallel": "vocab_parallel",
    "communication": "communication",
}


def load(name: str) -> Family:
    """The family of that name."""
    found = importlib.import_module(f"bench.families.{FAMILIES[name]}").FAMILY
    assert isinstance(found, Family)
    return found
