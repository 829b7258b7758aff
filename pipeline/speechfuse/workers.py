"""Worker processes of the jobs that make shards.

In: the number of processes. Out: a process pool whose workers end with the job, also when it is
killed.
"""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process


def _end_with_the_parent() -> None:
    def wait() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pool(workers: int) -> ProcessPoolExecutor:
    """`workers` processes; spawned, not forked: torch's threads do not survive a fork."""
    if workers < 1:
        raise ValueError(f"runtime.workers={workers}: at least 1 process is needed")
    return ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_end_with_the_parent
    )
