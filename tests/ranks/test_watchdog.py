"""The watchdog ends a process that is stuck, says where, and leaves one alone that is not."""

import subprocess
import sys

PROGRAM = """
import threading
from sadm_fast.ranks.watchdog import Watchdog

with Watchdog({patience}, rank=3, doing="starting", code=5) as watchdog:
    for step in range({steps}):
        watchdog.alive(f"in step {{step}}")
        threading.Event().wait({pause})
    if {stuck}:
        threading.Event().wait()
print("through")
"""


def run(**values: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(**values)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_that_is_stuck_ends_and_says_where():
    done = run(patience=0.2, steps=2, pause=0, stuck=True)
    assert done.returncode == 5 and done.stdout == ""
    assert done.stderr.startswith("error: rank 3: no progress for 0.2 s (in step 1); ")
    assert 'File "<string>"' in done.stderr and "The same command continues" in done.stderr


def test_progress_is_enough_however_long_it_takes_in_all():
    done = run(patience=1.0, steps=15, pause=0.1, stuck=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "through\n", "")
