"""Worker processes of the jobs that make shards.

In: a function and its tasks, one for each shard. Out: the results, in the order in which the tasks
finish. A worker process ends when the job's process ends, even if that is killed.
`speechfuse.ray_cluster` runs the same tasks on other machines.
"""

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from speechfuse import failures

_device = "cpu"


def device() -> str:
    """Return the device of this worker process: "cpu" or "cuda:3"."""
    return _device


def use(name: str, threads: int = 0) -> None:
    """Set this process's device and, unless `threads` is 0, its number of torch threads."""
    global _device
    _device = name
    if threads:
        import torch  # takes seconds; mistakes in a config are reported before

        torch.set_num_threads(threads)


def _begin(devices: Any, threads: int) -> None:
    failures.end_with_parent()
    use(devices.get(), threads)


def gpus(device: str) -> list[str]:
    """Return this machine's GPUs, ["cuda:0", ...], for `device` "cuda" or "auto"; [] for "cpu", and
    for "auto" without a GPU. Raises ValueError for "cuda" without a GPU and for any other name."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"runtime.device={device!r}: choose auto, cpu or cuda")
    count = 0
    if device != "cpu":
        import torch

        count = torch.cuda.device_count()
    if device == "cuda" and not count:
        raise ValueError("runtime.device=cuda, but torch finds no GPU here; use auto or cpu")
    return [f"cuda:{i}" for i in range(count)]


def pool(workers: int, devices: list[str] | None = None, threads: int = 0) -> ProcessPoolExecutor:
    """Return a pool with one process for each of `devices` or, without any, with `workers`
    processes on the CPU. Each process has `threads` torch threads (0: torch's default). The
    processes are spawned, not forked: torch's threads do not survive a fork. Raises ValueError for
    `workers` < 1.
    """
    if workers < 1:
        raise ValueError(f"runtime.workers={workers}: at least 1 process is needed")
    # the process that removes the semaphores of a pool after Ctrl-C need not warn that it does
    sys.warnoptions.append("ignore:resource_tracker")
    devices = devices or ["cpu"] * workers
    context = get_context("spawn")
    queue = context.SimpleQueue()
    for name in devices:
        queue.put(name)
    executor = ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_begin, initargs=(queue, threads)
    )
    # a process has the mask of its parent: Ctrl-C is for this process alone, which ends the others
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        executor.submit(int)  # starts all processes
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return executor


def processes(
    function: Callable[..., Any], tasks: list[tuple], workers: int, device: str
) -> Iterator[Any]:
    """Yield the result of each task as it finishes. The tasks run in one process for each GPU of
    gpus(`device`) or, without any, in `workers` processes on the CPU. Raises ValueError when a
    worker is killed; the shards that were finished by then stay on disk."""
    if not tasks:
        return
    with pool(workers, gpus(device)) as executor:
        futures = [executor.submit(function, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed (out of memory?); finished shards are kept: run the "
                "job again to resume, with fewer runtime.workers if memory was short"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


def prefetch(
    work: Callable[[Any], Any], items: Iterable[Any], threads: int, depth: int
) -> Iterator[Any]:
    """Yield work(item) for each item, in order. `threads` threads compute up to `depth` results
    ahead of the consumer."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error the remaining results are not wanted
            for future in waiting:
                future.cancel()
