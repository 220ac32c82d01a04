"""How worker processes are started: not by fork, and out of the reach of signals that are meant for the trainer."""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext


def worker_context(preload: str) -> ForkServerContext:
    """The context to start workers from.

    Not fork: by now torch and DALI have threads, and a lock that one of them holds is never freed in the child. Signals
    that ask a run to stop reach its whole process tree under DeepSpeed's launcher; the workers, which inherit the mask,
    are still needed for the step under way. They end with the process that started them.

    Args:
        preload: module to import once, for all workers.
    """
    multiprocessing.set_forkserver_preload([preload])
    resource_tracker.ensure_running()  # its start unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return multiprocessing.get_context("forkserver")
