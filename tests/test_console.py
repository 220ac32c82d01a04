"""What is said, and to whom."""

import os
import subprocess
import sys

import pytest

SPEAK = """
from sadm_fast.console import Console
console = Console()
for i in range(3):
    console.say("a word")
    console.complain("a complaint")
with console.bar("training", 2) as bar:
    bar.at(1), bar.at(2)
raise SystemExit(7)
"""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_who_goes_does_not_end_the_training(closed: str):
    reading, writing = os.pipe()
    os.close(reading)
    out, err = (writing, subprocess.PIPE) if closed == "stdout" else (subprocess.PIPE, writing)
    try:
        done = subprocess.run([sys.executable, "-c", SPEAK], stdout=out, stderr=err, text=True, timeout=60)
    finally:
        os.close(writing)
    assert done.returncode == 7
    heard = done.stderr if closed == "stdout" else done.stdout
    assert heard.count("a complaint" if closed == "stdout" else "a word") == 3
