"""The command line that the entry points share: arguments from launchers, exit codes, errors in one line.

Exit codes: 0 done; 1 another rank is gone or hangs (or a bug, with its traceback); 2 something for the user to change,
in one line; 75 stopped before the end; 130 interrupted by Ctrl-C.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from sadm_fast.console import accept_any_text
from sadm_fast.errors import LostRank, UserError
from sadm_fast.files import expand_home
from sadm_fast.ranks import environment
from sadm_fast.ranks.stopping import Stopped, StopRequest

EXIT_LOST = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command goes on
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser that takes what launchers add, and whose errors are UserErrors."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        # deepspeed and torch.distributed.launch add it; the rank is taken from LOCAL_RANK, which they set as well.
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
        self.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # asks for what is always so

    def add_config(self, group: "argparse._ActionsContainer | None" = None, *, required: bool = True) -> None:
        """Add --config (to `group`, if it is one of several choices) and --set."""
        (group or self).add_argument(
            "--config", "--deepspeed_config", required=required, metavar="FILE", help="a JSON file as in configs/"
        )
        self.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
            help="change a field of the configuration, for example --set train.steps=100; may be repeated",
        )  # fmt: skip

    def add_model(self) -> None:
        """Add what names a trained model: a run and --ema, or --weights and --config; and --set; then `check_model`."""
        self.add_argument(
            "run", type=path, nargs="?",
            help="the run's folder, for example runs/mnist, or one of its checkpoints,"
            " runs/mnist/checkpoints/step-000500",
        )  # fmt: skip
        self.add_argument(
            "--ema", metavar="WHICH",
            help="of the run's averages, for example power-0.05; a number is the length of any power-function average,"
            " made of its snapshots (default: train.ema)",
        )  # fmt: skip
        self.add_argument(
            "--weights", type=path, metavar="PATH", help="a denoiser's weights without a run, as denoiser.weights"
        )
        self.add_config(required=False)

    def add_precision(self) -> None:
        """Add --precision, of the networks that draw."""
        self.add_argument(
            "--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
            help="of the denoiser's arithmetic (default: fp32); tf32: of GPUs, and of the decoder and the judges too",
        )  # fmt: skip

    def check_model(self, arguments: argparse.Namespace) -> None:
        """UserError unless the arguments name one model."""
        if (arguments.run is None) == (arguments.weights is None):
            self.error("give either the folder of a run, or --weights and --config")
        if (arguments.weights is None) != (arguments.config is None):
            self.error("--weights and --config go together; a run has its own")
        if arguments.weights is not None and arguments.ema is not None:
            self.error("--ema chooses among a run's averages; --weights are as they are")

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a UserError; "argument --count: 0: too small" becomes "--count 0: too small"."""
        subject, colon, rest = message.partition(": ")
        if colon and subject.startswith("argument "):
            message = f"{subject.removeprefix('argument ')} {rest}"
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number") from None
        if not low <= value <= high:
            limit = f"at least {low}" if value < low else f"at most {high}"
            raise argparse.ArgumentTypeError(f"{text}: must be {limit}")
        return value

    return parse


def real(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: numbers from `low` (excluded, if `above`) to `high`; never NaN or infinite."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a number") from None
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text}: must be {'above' if above else 'from'} {low:g} to {high:g}")
        return value

    return parse


def path(text: str) -> Path:
    """An argparse type: a path, with `~` as the home folder."""
    if not text:
        raise argparse.ArgumentTypeError('"": must be a path')
    return Path(expand_home(text))


def run(work: Callable[[StopRequest], int], *, again: str) -> int:
    """Do the work of an entry point and return the exit code; errors are printed in one line.

    Args:
        work: parses the arguments, checks them, does what they say, and returns the exit code.
        again: what the same command does after an interruption, for example "starts again".
    """
    accept_any_text()
    request = StopRequest()
    try:
        try:
            environment.check_environment()
            return work(request)
        finally:
            request.defer()
    except UserError as error:
        if environment.speaks_for_machine() if error.said is None else not error.said:
            _print(f"error: {error}")
        return EXIT_USER_ERROR
    except LostRank as error:
        _print(f"error: {error}; the same command {again}")
        return EXIT_STOPPED if request.asked else EXIT_LOST
    except Stopped:
        _print(f"asked to stop; the same command {again}")
        return EXIT_STOPPED
    except KeyboardInterrupt:
        if environment.speaks_for_machine():
            _print(f"interrupted; the same command {again}")
        return EXIT_INTERRUPTED


def is_sole_worker(what: str) -> bool:
    """Whether this is the rank that does what takes one rank only; rank 0 says so if there are others."""
    ranks = environment.world_size()
    if environment.rank() == 0 and ranks > 1:
        _print(f"{what} uses one rank: the other {ranks - 1} of {ranks} have nothing to do")
    return environment.rank() == 0


def _print(text: str) -> None:
    """One line on stderr; what would break the line or cannot be shown (parts of file names) is escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process with this exit code, its output flushed and nothing else done.

    For a command that has started DeepSpeed: that keeps the process group, whose threads outlive it and now and then
    abort the interpreter's own end ("terminate called without an active exception", exit code -6).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
