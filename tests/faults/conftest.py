"""Trainings to spoil, and the table of what was tried."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.faults.faults import Fault, environment
from tests.support.programs import Program, start_line
from tests.support.ranks import ROOT, meeting
from tests.test_train import write_images

RANKS, STEPS, CHECKPOINT_EVERY = 2, 40, 3
SCRIPT = ROOT / "tests" / "faults" / "faulty_train.py"
VARIANTS = {
    "zero0": ["deepspeed.zero_optimization.stage=0"],
    "zero1": ["deepspeed.zero_optimization.stage=1"],
    "zero2-bf16": ["deepspeed.zero_optimization.stage=2", "train.precision=bf16", "game.scope=global", "game.queue=16"],
    "zero3": ["deepspeed.zero_optimization.stage=3"],
}
TABLES = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", type=Path, help="write what was tried, and what became of it, to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tables = config.stash[TABLES]
    path = config.getoption("--faults-table")
    if not tables:
        return
    text = "\n\n".join("\n".join(rows) for rows in tables.values())
    terminalreporter.section("faults")
    terminalreporter.write_line(text)
    if path:
        counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error")}
        path.write_text(f"# What `make test-faults` did last\n\n{_where()}; tests: {counts}\n\n{text}\n")


def _where() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    versions = [f"{name} {version(name)}" for name in ("torch", "deepspeed")]
    return f"Commit {commit.strip()}, {', '.join(versions)}, {os.cpu_count()} cores, two ranks of one thread, gloo"


Row = Callable[..., None]


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """row(header, *cells): a line of the table with that header."""

    def write(header: str, *cells: object) -> None:
        columns = header.count("|") + 1
        head = [f"| {header} |", "|" + " --- |" * columns]
        request.config.stash[TABLES].setdefault(header, head).append(f"| {' | '.join(map(str, cells))} |")

    return write


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
                "steps": STEPS, "micro_batch": 4, "log_every": 1, "sample_every": 10, "patience": 40,
                "checkpoint_every": CHECKPOINT_EVERY, "ema": {"profile": "exponential", "decay": 0.9},
            },
            "sampling": {"steps": 1, "columns": 3, "rows": 1},
        }  # fmt: skip
        write_images(folder / "images")
        (folder / "tiny.json").write_text(json.dumps(tiny))

    def arguments(self, run: Path, overrides: Sequence[str] = ()) -> list[str]:
        changes = [part for override in (*VARIANTS[self.variant], *overrides) for part in ("--set", override)]
        return ["--config", str(self.folder / "tiny.json"), "--run-dir", str(run), *changes]

    def launch(self, run: Path, *faults: Fault, overrides: Sequence[str] = (), **more: str) -> Program:
        """Started by DeepSpeed's launcher."""
        argv = start_line(SCRIPT, *self.arguments(run, overrides), ranks=RANKS)
        return Program(argv, self.folder, environment(*faults) | more)

    def run(self, run: Path, *faults: Fault) -> list[tuple[int, str]]:
        """Two ranks without a launcher, as srun starts them, to their end: exit code and output of each."""
        argv = [sys.executable, str(SCRIPT), *self.arguments(run)]
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # nobody can take its port in between
        ranks = [
            Program(argv, self.folder, meeting(store, rank, RANKS) | environment(*faults)) for rank in range(RANKS)
        ]
        said = [rank.finish(code=None) for rank in ranks]
        return [(rank.process.returncode, out + err) for rank, (out, err) in zip(ranks, said, strict=True)]

    def run_well(self, run: Path) -> None:
        """The same to the last step."""
        ended = self.run(run)
        assert [code for code, _ in ended] == [0] * RANKS, ended


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Training, Path]]]:
    """training(variant): it, and the run folder of an uninterrupted one."""
    made: dict[str, tuple[Training, Path]] = {}

    def make(variant: str) -> tuple[Training, Path]:
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            one = Training(folder, variant)
            one.run_well(folder / "whole")
            made[variant] = one, folder / "whole"
        return made[variant]

    yield make
