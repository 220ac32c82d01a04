"""What holds for every test."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, from child processes too, unless the tests marked `gpu` were asked for (`make test-gpu`).

    So a machine with GPUs runs the CPU tests as one without; CUDA reads the variable when it starts.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
