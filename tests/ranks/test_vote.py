"""The flags that all ranks OR, with the sum over ranks made here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sadm_fast.ranks import vote
from sadm_fast.ranks.vote import Answers, Vote


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the flags of the other ranks."""
    flags = torch.zeros(3, dtype=torch.int32)

    def summed(mine: Tensor) -> Tensor:
        return mine + flags

    monkeypatch.setattr(vote, "is_distributed", lambda: True)
    monkeypatch.setattr(vote, "communication_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(vote, "sum_over_ranks", summed)

    def set_to(*values: int) -> None:
        flags.copy_(torch.tensor(values))

    return set_to


def test_alone_the_answer_is_ones_own():
    assert Vote(lambda: True, lambda: (False, True)).ask() == Answers(stop=True, writing=False, write_failed=True)


def test_an_iteration_hears_what_was_asked_in_the_one_before(others: Callable[..., None]):
    asking = Vote(lambda: False, lambda: (False, False))
    others(1, 0, 2)
    assert asking.ask() == Answers(stop=False, writing=True, write_failed=False)  # nothing is known yet
    others(0, 1, 0)
    assert asking.ask() == Answers(stop=True, writing=False, write_failed=True)
    assert asking.ask() == Answers(stop=False, writing=True, write_failed=False)


def test_a_save_is_not_taken_for_written_by_what_was_asked_before_it(others: Callable[..., None]):
    asking = Vote(lambda: False, lambda: (False, False))
    asking.ask()
    asking.start_anew()
    assert asking.ask().writing
    assert not asking.ask().writing
