"""A server of the tiny model, one for all tests that ask it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def _served() -> Iterator[Any]:
    from causal_models import llama
    from served_model import serving

    with serving(llama(9)) as made:
        yield made


@pytest.fixture
def server(_served: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without faults, and without requests so far; attempts come at once."""
    from fastkd.teachers.served import client

    monkeypatch.setattr(client, "FIRST_DELAY", 0.001)
    _served.faults, _served.delay, _served.most = [], 0.0, 0
    _served.requests.clear()
    return _served
