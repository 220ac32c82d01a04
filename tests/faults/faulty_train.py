"""sadm_fast/train.py with faults: the same arguments, and in SADM_FAULTS what goes wrong where (faults.py).

Without that variable it is train.py, so that "the same command" can be given again after a fault.
"""

import errno
import importlib
import inspect
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[2])  # where sadm_fast is

from sadm_fast.errors import UserError  # noqa: E402


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    threading.Event().wait()


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def complain() -> None:
    raise UserError("only here")


def slow() -> None:
    time.sleep(0.2)


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "hang": hang,
    "fail": fail,
    "complain": complain,
    "slow": slow,
}


def spoiled(value: Any) -> Any:
    """A tensor as NaN; of a tuple, everything in it that can be."""
    if isinstance(value, torch.Tensor):
        return value * torch.nan if value.is_floating_point() else value
    return type(value)(*map(spoiled, value)) if isinstance(value, tuple) else value


def torn(path: Path) -> None:
    """Leave half of a file that was just written."""
    os.truncate(path, path.stat().st_size // 2)


def inject(fault: dict[str, Any]) -> None:
    """Put the fault before or after its calls of a function, wherever the code under test looks it up."""
    module, _, path = fault["target"].partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    calls = itertools.count(1)

    def faulty(*arguments: Any, **options: Any) -> Any:
        call = next(calls)
        now = call == fault["call"] or (call > fault["call"] and fault["again"])
        if now and fault["when"] == "before":
            ACTIONS[fault["action"]]()
        result = real(*arguments, **options)
        if now and fault["when"] == "torn":
            torn(Path(arguments[1]))
            kill()
        if now and fault["when"] == "after":
            if fault["action"] == "nan":
                return spoiled(result)
            ACTIONS[fault["action"]]()
        return result

    setattr(
        owner, name, staticmethod(faulty) if isinstance(inspect.getattr_static(owner, name), staticmethod) else faulty
    )


def jumping_clock() -> None:
    """Let the wall clock jump by up to a year at each look, either way; the monotonic one goes on."""
    chance, real = random.Random(0), time.time

    def jump() -> float:
        return real() + chance.uniform(-3e7, 3e7)

    time.time = jump
    time.time_ns = lambda: int(jump() * 1e9)


def main() -> int:
    import sadm_fast.train as train

    if os.environ.get("SADM_CLOCK") == "jumps":
        jumping_clock()
    faults = json.loads(os.environ.get("SADM_FAULTS", "[]"))
    mine = [fault for fault in faults if fault["rank"] in (None, int(os.environ.get("RANK", "0")))]
    for fault in mine:
        inject(fault)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
