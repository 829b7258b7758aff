"""Worker processes of the jobs that make shards.

In: a function and its tasks, one a shard. Out: the results, in the order in which they finish. A
worker ends with the job, also when that is killed. `speechfuse.ray_cluster` runs the same tasks on
other machines.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

_device = "cpu"


def device() -> str:
    """Return the device of this worker process: "cpu" or "cuda:3"."""
    return _device


def use(name: str, threads: int = 0) -> None:
    """Set this process's device, and its torch threads unless `threads` is 0."""
    global _device
    _device = name
    if threads:
        import torch  # not above: jobs answer mistakes before it is imported, which takes seconds

        torch.set_num_threads(threads)


def _begin(devices: Any, threads: int) -> None:
    use(devices.get(), threads)

    def end_with_the_parent() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def gpus(device: str) -> list[str]:
    """Return ["cuda:0", ...] of this machine for `device` cuda or auto, [] for the CPU. Raises
    ValueError when there is no such device."""
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
    """Return a pool of `workers` processes on the CPU, or of one for each of `devices`, each with
    `threads` torch threads. They are spawned, not forked: torch's threads do not survive a fork."""
    if workers < 1:
        raise ValueError(f"runtime.workers={workers}: at least 1 process is needed")
    devices = devices or ["cpu"] * workers
    context = get_context("spawn")
    queue = context.SimpleQueue()
    for name in devices:
        queue.put(name)
    return ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_begin, initargs=(queue, threads)
    )


def processes(
    function: Callable[..., Any], tasks: list[tuple], workers: int, device: str
) -> Iterator[Any]:
    """Give the results of the tasks, run in `workers` processes on the CPU or one for each GPU of
    this machine. Raises ValueError when a worker is killed; finished shards are on disk."""
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
    """Give `work` of each item in order, computed in `threads` threads up to `depth` items ahead of
    the consumer."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error nobody wants the others
            for future in waiting:
                future.cancel()
