"""Worker processes: they outlive signals meant for the trainer, but not the trainer, and leave nothing behind."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from sadm_fast.data import open_images, workers
from sadm_fast.errors import UserError
from tests.data.loaders import open_loader

PROGRAM = """
import sys, time
from sadm_fast.data import LoaderSpec, MicroBatchPlan, make_loader, open_images

source = open_images(sys.argv[1])
plan = MicroBatchPlan(num_images=len(source), seed=1, flip=True, micro_batch=4)
loaders = [make_loader(source, plan, LoaderSpec(8, 1, loader=loader)) for loader in sys.argv[2:]]
print(*(next(loader).images.shape for loader in loaders), flush=True)
"""


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends(small_folder: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(small_folder), "dali", "torch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("[4, 1, 8, 8]") == 2
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_workers_end_when_their_trainer_is_killed_and_leave_nothing(small_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"{PROGRAM}time.sleep(100)", str(small_folder), "torch"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as trainer:
        assert trainer.stdout is not None and b"[4, 1, 8, 8]" in trainer.stdout.readline()
        children = psutil.Process(trainer.pid).children(recursive=True)
        (folder,) = tmp_path.glob("sadmw-*")
        assert len(children) == 4 and _semaphores(folder)  # two workers, what forks them, and the resource tracker
        trainer.kill()
        try:
            trainer.communicate(timeout=20)  # the end of the pipe, which all of them have inherited
        except subprocess.TimeoutExpired:
            for child in children:
                child.kill()
            raise
    assert not folder.exists() and _semaphores(folder) == []


def _semaphores(folder: Path) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if folder.name in name]


def test_what_killed_trainers_left_goes_but_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workers, "_SEMAPHORES", tmp_path / "shm")
    names = ["sadmw-dead5678", "sadmw-used5678", "sadmw-notes", "sadmw-full5678"]
    dead, used, notes, full = (tmp_path / name for name in names)
    semaphores = [tmp_path / "shm" / f"sem.{folder.name}-1" for folder in (dead, used)]
    for path in (dead / "listener-1", used / "listener-1", notes / "listener-1", full / "work.txt", *semaphores):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    workers._remove_abandoned()
    os.close(descriptor)
    assert [path.exists() for path in (dead, used, notes, full)] == [False, True, True, True]
    assert (used / "listener-1").exists() and (full / "work.txt").exists() and (notes / "listener-1").exists()
    assert [path.exists() for path in semaphores] == [False, True]


def test_a_temporary_folder_too_long_for_sockets_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for length, used in [(74, True), (75, False)]:
        monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
        assert (workers._parent() == Path(tempfile.gettempdir())) == used
        name = f"{workers._parent()}/{workers._PREFIX}12345678/listener-12345678"
        assert len(name) <= 107


def test_workers_outlive_a_signal_to_the_whole_process_tree(small_folder: Path) -> None:
    with open_loader(open_images(small_folder), loader="torch", threads=2) as batches:
        next(batches)
        children = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
        servers = {child.parent() for child in children}  # what they are forked from
        for process in [*children, *servers]:
            assert process is not None
            process.send_signal(signal.SIGTERM)
        for _ in range(8):  # more than are prefetched
            next(batches)


def test_a_worker_that_is_killed_is_one_clear_line(small_folder: Path) -> None:
    with open_loader(open_images(small_folder), loader="torch") as batches:
        next(batches)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(UserError, match=r"^data.loader=torch: a worker process was killed.*data.threads=1"):
            list(batches)
        assert list(batches) == []
