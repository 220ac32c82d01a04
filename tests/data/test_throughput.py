"""Counting images a second."""

from collections.abc import Callable
from typing import Any

import pytest

from sadm_fast.data import throughput
from sadm_fast.data.throughput import measure


class _Clock:
    """A clock that only the loaders move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


class _Loader:
    """Takes `seconds` for a micro-batch, ten times as long for the first."""

    def __init__(self, clock: _Clock, seconds: float, log: list[str], name: str) -> None:
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name
        self.taken = 0
        log.append(f"open {name}")

    def __next__(self) -> Any:
        self.clock.now += self.seconds * (1 if self.taken else 10)
        self.taken += 1

    def close(self) -> None:
        self.log.append(f"close {self.name} after {self.taken}")


def _factories(clock: _Clock, log: list[str], **seconds: float) -> dict[str, Callable[[], _Loader]]:
    return {name: lambda name=name: _Loader(clock, seconds[name], log, name) for name in seconds}  # type: ignore[misc]


def test_images_a_second_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    slow, fast = measure(_factories(clock, [], slow=0.5, fast=0.25), micro_batch=8, warmup=1, batches=4, rounds=3)
    assert slow == ("slow", 16.0, (16.0, 16.0), (16.0, 16.0, 16.0))
    assert (fast.name, fast.median) == ("fast", 32.0)


def test_without_warm_up_the_first_batch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = measure(_factories(_Clock(monkeypatch), [], loader=1.0), micro_batch=11, warmup=0, batches=2, rounds=1)
    assert found.median == 2.0  # 22 images in 11 seconds


def test_loaders_take_turns_and_each_round_begins_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    measure(_factories(_Clock(monkeypatch), log, a=1, b=1), micro_batch=1, warmup=2, batches=3, rounds=2)
    turns = [entry for entry in log if entry.startswith("open")]
    assert turns == ["open a", "open b", "open b", "open a"]
    assert log[:2] == ["open a", "close a after 5"]


def test_median_and_spread_over_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = _Clock(monkeypatch), iter([1.0, 4.0, 2.0])
    (found,) = measure(
        {"loader": lambda: _Loader(clock, next(times), [], "loader")}, micro_batch=4, warmup=1, batches=1, rounds=3
    )
    assert found == ("loader", 2.0, (1.0, 4.0), (4.0, 1.0, 2.0))


def test_a_loader_that_fails_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Broken(_Loader):
        def __next__(self) -> Any:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure({"x": lambda: Broken(_Clock(monkeypatch), 1, log, "x")}, micro_batch=1, warmup=0, batches=1, rounds=1)
    assert log == ["open x", "close x after 0"]


@pytest.mark.parametrize("wrong", ["micro_batch", "batches", "rounds"])
def test_counts_below_one_are_refused(wrong: str) -> None:
    counts = {"micro_batch": 1, "warmup": 0, "batches": 1, "rounds": 1} | {wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong}=0"):
        measure({}, **counts)
