"""Starts processes as forks of one that has imported torch and its compiler: that takes most of a short rank's time.

    python -m tests.support.rank_starter

reads requests from stdin, a line of JSON each: `module`, `arguments`, the `environments` of the processes and a file
for the output of each (`logs`). Each runs as `python -m module arguments...` would. The answer, a line of JSON, is
their exit codes, once all have ended; when one fails, the others, which would wait for it, are killed.
"""

import gc
import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable

import torch._dynamo  # noqa: F401  torch itself, and what its first optimizer imports


def become(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """`python -m module arguments...` in this process, with both streams into a file."""
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(descriptor, target)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> Callable[[], None] | None:
    """Serve until stdin ends; in a fork, what it has to do instead."""
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    gc.freeze()  # garbage collection would copy every page
    for line in sys.stdin:
        request = json.loads(line)
        started = []
        for environment, log in zip(request["environments"], request["logs"], strict=True):
            if not (pid := os.fork()):
                return lambda: become(request["module"], request["arguments"], environment, log)  # noqa: B023
            started.append(pid)
        print(json.dumps(ended(started)), flush=True)
    return None


def ended(processes: list[int]) -> list[int]:
    """Exit codes of children, minus the signal for one that was killed."""
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process]:
            for other in set(processes) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[process] for process in processes]


if __name__ == "__main__":
    if work := main():
        work()
