"""Groups that cannot work: not initialised, or with a rank that dies."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist

import fastkd


def test_without_torch_distributed_initialised() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="not initialised; call init_process_group"):
        fastkd.kl_div(x, x, group=object())


def dies() -> str:
    x = torch.randn(512, 100, requires_grad=True)
    for step in range(1000):
        if dist.get_rank() == 1 and step == 3:
            import os

            os._exit(1)  # in the middle of a step of the others
        try:
            fastkd.kl_div(x, x.detach().roll(1, 0), group=dist.group.WORLD).backward()
        except RuntimeError as error:
            return str(error)
    return "went on without the dead one"


def test_a_rank_that_dies_ends_the_others_with_an_error() -> None:
    with pytest.raises(AssertionError, match="rank 1: died") as found:
        ranks.run(2, dies)
    assert "rank 0" not in str(found.value)
