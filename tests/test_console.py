"""What is printed, and to whom; no text and no reader ends a program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEAK = """
from sadm_fast.console import Console
console = Console()
for i in range(3):
    console.say("a word, \\u03a8, :smile: [bold] caf\\udce9")
    console.complain("a complaint, \\u03a8, caf\\udce9")
with console.bar("training", 2) as bar:
    bar.at(1), bar.at(2)
raise SystemExit(7)
"""


def speak(shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program above behind redirections of a shell."""
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, SPEAK],
        capture_output=True, timeout=60, env=os.environ | environment,
    )  # fmt: skip


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


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_nor_does_a_stream_that_is_closed_or_full(shell: str):
    if "/dev/full" in shell and not Path("/dev/full").exists():
        pytest.skip("Linux only")
    done = speak(shell)
    assert done.returncode == 7
    assert b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "psi"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"\\u03a8"),
        ({"PYTHONIOENCODING": "latin-1"}, b"\\u03a8"),
        ({"PYTHONIOENCODING": "utf-8"}, "\u03a8".encode()),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"\\u03a8"),
    ],
)
def test_what_cannot_be_shown_is_escaped(environment: dict[str, str], psi: bytes):
    done = speak(**environment)
    assert done.returncode == 7
    assert done.stdout.splitlines()[:3] == [b"a word, " + psi + rb", :smile: [bold] caf\udce9"] * 3
    assert done.stderr.count(b"caf\\udce9") == 3
