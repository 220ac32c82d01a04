"""How ranks start and end together: errors that all of them meet, or one."""

import os
import subprocess
import sys

import pytest
import torch

from sadm_fast.errors import UserError
from sadm_fast.ranks import launch
from tests.support.programs import free_port
from tests.support.ranks import clean_environment

WORKER = """
import sys
from sadm_fast import cli
from sadm_fast.errors import UserError
from sadm_fast.ranks import launch
launch._GOODBYE_S = {goodbye}

def work(request):
    with launch.distributed(deepspeed=False) as place:
        if place.rank < {failing}:
            raise UserError("caf\\udce9 has to change")
    return 0

sys.exit(cli.run(work, again="starts again"))
"""


@pytest.mark.parametrize(("failing", "codes", "goodbye"), [(2, [2, 2], 60.0), (1, [2, 0], 0.1)])
def test_an_error_is_one_line_of_all_ranks_together(failing: int, codes: list[int], goodbye: float):
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER.format(failing=failing, goodbye=goodbye)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment() | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == codes, said
    lines = [line for out, err in said for line in (out + err).splitlines()]
    assert [line for line in lines if "error" in line] == ["error: caf\\udce9 has to change"]
    assert not any("frame #" in line or "Traceback" in line for line in lines), lines


def test_without_deepspeed_no_thread_outlives_the_process_group(monkeypatch: pytest.MonkeyPatch):
    """A thread of gloo's that is left aborts a process that ends at once, now and then."""

    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")  # it is set, and here set back
    before = threads()
    with launch.distributed(deepspeed=False):
        torch.distributed.all_reduce(torch.ones(1))
        assert threads() - before
    assert not threads() - before


@pytest.mark.parametrize(
    ("gpus", "variables", "expected"),
    [
        (0, {}, "cpu"),
        (2, {}, "cuda:0"),
        (2, {"LOCAL_RANK": "1"}, "cuda:1"),
        (2, {"LOCAL_RANK": "1", "DS_ACCELERATOR": "cpu"}, "cpu"),
        (2, {"LOCAL_RANK": "2"}, "LOCAL_RANK=2: this process sees 2 GPU"),
        (0, {"DS_ACCELERATOR": "cuda"}, "DS_ACCELERATOR=cuda: torch finds no GPU"),
    ],
)
def test_a_ranks_device_is_the_gpu_of_its_number(
    gpus: int, variables: dict[str, str], expected: str, environment: pytest.MonkeyPatch
):
    environment.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    environment.setattr(torch.cuda, "device_count", lambda: gpus)
    environment.delenv("DS_ACCELERATOR", raising=False)
    for name, value in variables.items():
        environment.setenv(name, value)
    if ":" in expected and not expected.startswith("cuda"):
        with pytest.raises(UserError, match=f"^{expected}"):
            launch.own_device()
    else:
        assert str(launch.own_device()) == expected
