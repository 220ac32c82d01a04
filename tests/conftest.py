"""What holds for every test: no GPU unless asked for, and signal handlers as they were."""

import os
import signal
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, from child processes too, unless the tests marked `gpu` were asked for (`make test-gpu`).

    So a machine with GPUs runs the CPU tests as one without; CUDA reads the variable when it starts.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Entry points take over signals; called inside pytest, they must not keep them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
