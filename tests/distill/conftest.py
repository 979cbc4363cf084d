"""Fixtures of the tests of the workflow."""

from __future__ import annotations

import pytest
import torch
from trainer_runs import Loader

from fastkd.distill.losses import chunked


@pytest.fixture
def loader() -> Loader:
    """Three classes that a line can tell apart, in six batches."""
    inputs = torch.randn(48, 5)
    return list(zip(inputs.chunk(6), inputs[:, :3].argmax(-1).chunk(6), strict=True))


@pytest.fixture(params=[False, True], ids=["whole", "in-chunks"])
def in_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A batch at once, as small ones are, or two rows at a time."""
    if request.param:
        monkeypatch.setattr(chunked, "HOST_ELEMENTS", 20)
    return bool(request.param)
