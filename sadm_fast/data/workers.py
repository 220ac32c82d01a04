"""Worker processes that are not forked, ignore signals meant for the trainer, and end when it ends.

Workers' semaphores and sockets have names in /dev/shm and the temporary folder. multiprocessing removes them when the
trainer or the last of its processes ends. When all of them are killed at once, nothing does: so the names contain that
of a folder which the trainer keeps locked, and the next trainer removes what belongs to folders that nobody locks.
"""

import contextlib
import fcntl
import functools
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from multiprocessing import connection, forkserver, process, resource_tracker, util
from multiprocessing.context import ForkServerContext
from pathlib import Path

_PREFIX = "sadmw-"
_FOLDER = re.compile(re.escape(_PREFIX) + r"\w{8}")  # as tempfile.mkdtemp makes them
_SEMAPHORES = Path("/dev/shm")
_MAX_PARENT = 107 - len(f"/{_PREFIX}12345678/listener-12345678")  # a socket's path has at most 107 bytes


def worker_context(preload: str) -> ForkServerContext:
    """The context to start workers from; each of them calls end_with_trainer first.

    Not fork: by now torch and DALI have threads, and a lock that one of them holds is never freed in the child. Signals
    that ask a run to stop reach its whole process tree under DeepSpeed's launcher; the workers, which inherit the mask,
    are still needed for the step under way.

    Args:
        preload: module to import once, for all workers.
    """
    _name_after_folder()
    multiprocessing.set_forkserver_preload([preload])
    resource_tracker.ensure_running()  # its start unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return multiprocessing.get_context("forkserver")


def end_with_trainer(_worker: int = 0) -> None:
    """In a worker: end as soon as the process that asked for it has ended, even by SIGKILL.

    A worker's parent is the fork server, which lives as long as its workers do, so nobody else would notice.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        connection.wait([trainer.sentinel])  # a pipe, whose other end only the trainer has
        _remove(Path(util.get_temp_dir()))
        os._exit(1)  # at once, whatever the other threads wait for

    threading.Thread(target=watch, name="end with trainer", daemon=True).start()


@functools.cache  # once in a process
def _name_after_folder() -> None:
    """Make a folder for the sockets of this process and its workers, and name their semaphores after it."""
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_parent()))
    while _locked(folder, wait=True) is None and not folder.exists():  # taken for an abandoned one
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_parent()))
    config = process.current_process()._config  # type: ignore[attr-defined]  # children inherit it
    config["tempdir"], config["semprefix"] = str(folder), f"/{folder.name}"
    util.Finalize(None, _remove, args=(folder,), exitpriority=-100)  # behind those of the semaphores


def _parent() -> Path:
    """The temporary folder, or /tmp where its path is too long for sockets."""
    folder = tempfile.gettempdir()
    return Path(folder if len(os.fsencode(folder)) <= _MAX_PARENT else "/tmp")


def _remove_abandoned() -> None:
    """Remove what trainers that were killed with all their workers have left."""
    for folder in _parent().glob(f"{_PREFIX}*"):
        if _FOLDER.fullmatch(folder.name) and (lock := _locked(folder)) is not None:
            for semaphore in _SEMAPHORES.glob(f"sem.{folder.name}-*"):
                semaphore.unlink(missing_ok=True)
            _remove(folder)
            os.close(lock)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that keeps `folder` locked until it is closed; None if another process has it, or it is gone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            os.stat(folder)  # still there
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


def _remove(folder: Path) -> None:
    """Remove a folder of sockets."""
    with contextlib.suppress(OSError):
        for socket in folder.glob("listener-*"):
            socket.unlink(missing_ok=True)
        folder.rmdir()
