"""Worker processes of the jobs that make shards.

In: a function and its tasks, one a shard. Out: the results, as they come. A worker ends with the
job, also when that is killed. On another engine (`speechfuse.ray_cluster`) the same tasks run on
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

import torch

_device = "cpu"


def device() -> str:
    """The device of this worker process: "cpu" or "cuda:3"."""
    return _device


def use(name: str, threads: int = 0) -> None:
    """Make `name` the device of this worker process, of `threads` CPU threads; 0: as torch has."""
    global _device
    _device = name
    if threads:
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
    """["cuda:0", ...] of this machine for `device` cuda or auto, [] for the CPU; ValueError when
    there is no such device."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"runtime.device={device!r}: choose auto, cpu or cuda")
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        raise ValueError("runtime.device=cuda, but torch finds no GPU here; use auto or cpu")
    return [f"cuda:{i}" for i in range(count)]


def pool(workers: int, devices: list[str] | None = None, threads: int = 0) -> ProcessPoolExecutor:
    """`workers` processes on the CPU, or one for each of `devices`, of `threads` threads each;
    spawned, not forked: torch's threads do not survive a fork."""
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
    """Run the tasks on this machine: `workers` processes on the CPU, or one for each GPU.

    ValueError when a worker is killed; what the others had finished is on disk.
    """
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
    """`work` of each item in order, up to `depth` items ahead of the consumer in `threads`
    threads."""
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
