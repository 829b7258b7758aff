"""The same shard tasks on a Ray cluster (the extra `cluster`), for more machines than one.

    runtime:
      workers: 16
      engine: {_component_: speechfuse.ray_cluster.ray_actors, gpus: 1}

In and out as `speechfuse.workers.processes`. Ray's address comes from RAY_ADDRESS; without one a
local cluster is started. The clone, its .venv and the data must be on a file system that every
machine sees under the same path: workers write their shards there themselves.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from speechfuse import workers as local

ATTEMPTS = 3  # a task that loses so many workers is itself the cause


class Worker:
    """One actor: a process with the job's folder and its own device."""

    def __init__(self, folder: str, paths: list[str], device: str) -> None:
        os.chdir(folder)
        sys.path[:] = paths
        local.use(device)

    def run(self, function: Callable[..., Any], task: tuple) -> Any:
        return function(*task)


def ray_actors(
    function: Callable[..., Any],
    tasks: list[tuple],
    workers: int,
    device: str,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Iterator[Any]:
    """Run the tasks in `workers` actors of `cpus` CPUs and `gpus` GPUs each and give their results.

    Prints a notice for every lost worker, whose task goes to a new one. Raises ValueError when one
    task loses three, when the cluster cannot hold a single worker, and when `device` and `gpus`
    disagree: "cuda" without GPUs, "cpu" with. Fractions are allowed: two CPUs hold four actors of
    0.5.
    """
    if not tasks:
        return
    if device == ("cpu" if gpus else "cuda"):
        raise ValueError(
            f"runtime.device={device}, but runtime.engine.gpus={gpus:g} gives each worker "
            f"{f'{gpus:g} GPUs' if gpus else 'no GPU'}: set one of them to agree with the other"
        )
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError:
        raise ValueError(
            "runtime.engine=ray_actors needs Ray: pip install -e '.[cluster]'"
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        has = ray.cluster_resources()
        if has.get("CPU", 0) < cpus or has.get("GPU", 0) < gpus:
            raise ValueError(
                f"the Ray cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, a "
                f"worker asks for {cpus:g} and {gpus:g}: lower runtime.engine.cpus or .gpus"
            )
        if has.get("GPU") and not gpus:
            print("the workers use CPUs alone: runtime.engine.gpus=1 gives each a GPU")
        own_device = "cuda:0" if gpus else "cpu"  # Ray shows an actor only its own GPU
        actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(Worker)

        def start() -> Any:
            return actor.remote(os.getcwd(), sys.path, own_device)

        waiting, lost = list(reversed(tasks)), Counter[int]()
        running: dict[Any, tuple[Any, tuple]] = {}
        idle = [start() for _ in range(min(workers, len(tasks)))]
        while waiting or running:
            while waiting and idle:
                worker, task = idle.pop(), waiting.pop()
                running[worker.run.remote(function, task)] = (worker, task)
            (done,), _ = ray.wait(list(running), num_returns=1)
            worker, task = running.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                raise error.cause from None  # its own text is the traceback in the worker
            except RayActorError:
                lost[id(task)] += 1
                if lost[id(task)] == ATTEMPTS:
                    raise ValueError(
                        f"{ATTEMPTS} workers in a row were lost at the same shard (out of "
                        "memory?); finished shards are kept: run the job again to resume"
                    ) from None
                print("a worker was lost; its shard is made again by a new one", file=sys.stderr)
                waiting.append(task)
                idle.append(start())
                continue
            idle.append(worker)
            yield result
    finally:
        ray.shutdown()
