"""What a signal does before, during and after the part of a program that can be stopped."""

import os
import signal
from collections.abc import Iterator

import pytest

from sadm_fast.ranks.stopping import Stopped, StopRequest

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_anything_to_save_the_process_ends(request_: StopRequest, number: int):
    with pytest.raises(Stopped):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_inside_it_is_only_noted(request_: StopRequest, number: int):
    with request_.deferred():
        assert not request_.asked
        os.kill(os.getpid(), number)
        assert request_.asked


def test_a_second_ctrl_c_is_not_waited_for(request_: StopRequest):
    with pytest.raises(KeyboardInterrupt), request_.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert request_.asked
        os.kill(os.getpid(), signal.SIGINT)


def test_the_launchers_signal_does_not_cut_the_end_short(request_: StopRequest):
    with request_.deferred():
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def test_nor_what_is_said_after_an_error(request_: StopRequest):
    request_.defer()
    os.kill(os.getpid(), signal.SIGTERM)
    assert request_.asked


def test_no_launcher_is_watched_where_there_is_none(request_: StopRequest):
    assert not request_.asked
