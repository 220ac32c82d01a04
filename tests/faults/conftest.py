"""Trainings to spoil, and the table of what was tried."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.faults import Fault, environment
from tests.programs import Program, start_line
from tests.ranks import ROOT
from tests.test_train import write_images

STEPS, CHECKPOINT_EVERY = 40, 2
SCRIPT = ROOT / "tests" / "faults" / "faulty_train.py"
VARIANTS = {
    "zero0": ["deepspeed.zero_optimization.stage=0"],
    "zero1": ["deepspeed.zero_optimization.stage=1"],
    "zero2-bf16": ["deepspeed.zero_optimization.stage=2", "train.precision=bf16", "game.scope=global"],
    "zero3": ["deepspeed.zero_optimization.stage=3"],
}
TABLE = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", type=Path, help="write what was tried, and what became of it, to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[TABLE]
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join(rows))
        if path := config.getoption("--faults-table"):
            path.write_text("\n".join(rows) + "\n")


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """row(text): a line of the table."""
    return request.config.stash[TABLE].append


class Training:
    """One configuration on two ranks, started again and again with the same command."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.folder, self.variant = folder, variant
        tiny = {
            "name": "tiny",
            "data": {"path": str(folder / "images"), "resolution": 8, "channels": 1, "threads": 1},
            "denoiser": {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2},
            "structure_encoder": {"width": 8, "feature_dim": 8, "pretrain": {"steps": 5, "batch": 16}},
            "game": {"mode": "sadm"},
            "discriminator_optimizer": {"lr": 1e-4, "gradient_clipping": 1.0},
            "train": {
                "steps": STEPS, "micro_batch": 4, "log_every": 1, "sample_every": 5, "patience": 120,
                "checkpoint_every": CHECKPOINT_EVERY, "ema": {"profile": "exponential", "decay": 0.9},
            },
            "sampling": {"steps": 1, "columns": 3, "rows": 1},
        }  # fmt: skip
        write_images(folder / "images")
        (folder / "tiny.json").write_text(json.dumps(tiny))

    def start(self, run: Path, *faults: Fault, overrides: tuple[str, ...] = (), **more: str) -> Program:
        changes = [part for override in (*VARIANTS[self.variant], *overrides) for part in ("--set", override)]
        argv = start_line(
            SCRIPT, "--config", str(self.folder / "tiny.json"), "--run-dir", str(run), *changes, ranks=2
        )  # fmt: skip
        return Program(argv, self.folder, environment(*faults) | more)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Training, Path]]]:
    """training(variant): it, and the run folder of an uninterrupted one."""
    made: dict[str, tuple[Training, Path]] = {}

    def make(variant: str) -> tuple[Training, Path]:
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            one = Training(folder, variant)
            one.start(folder / "whole").finish()
            made[variant] = one, folder / "whole"
        return made[variant]

    yield make
