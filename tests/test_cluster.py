"""The Ray engine on a real cluster of this machine, one for all tests: results, lost workers,
refusals."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from speechfuse import ray_cluster, workers

pytest.importorskip("ray", reason="needs the extra cluster")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.address)
        yield
    nodes.shutdown()


def square(x: int) -> int:
    return x * x


def die_once(folder: str, x: int) -> tuple[int, str]:
    """The first worker that gets 3 is killed as by the system."""
    marker = Path(folder) / "died"
    if x == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x, workers.device()


def die(x: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_every_task_is_done_once_though_a_worker_is_killed(tmp_path, capfd):
    tasks = [(str(tmp_path), x) for x in range(8)]
    found = list(ray_cluster.ray_actors(die_once, tasks, workers=2, device="auto", cpus=0.5))
    assert sorted(found) == [(x, "cpu") for x in range(8)]
    assert (tmp_path / "died").exists()
    assert capfd.readouterr().err.count("a worker was lost; its shard is made again") == 1


def test_a_task_that_kills_three_workers_stops_the_job():
    with pytest.raises(ValueError, match=r"3 workers in a row were lost at the same shard"):
        list(ray_cluster.ray_actors(die, [(1,)], workers=1, device="auto", cpus=0.5))


def refuse(number: int) -> None:
    raise ValueError(f"{number} is refused")


def test_a_worker_that_fits_nowhere_is_refused_at_once():
    with pytest.raises(ValueError, match=r"a worker asks for 0.5 and 3: lower runtime.engine"):
        list(ray_cluster.ray_actors(square, [(1,)], workers=1, device="auto", cpus=0.5, gpus=3))


@pytest.mark.parametrize(("device", "gpus", "words"), [("cuda", 0, "no GPU"), ("cpu", 1, "1 GPUs")])
def test_a_device_and_gpus_that_disagree_are_refused(device, gpus, words):
    """And do not tokenize on CPUs without a word."""
    with pytest.raises(ValueError, match=rf"device={device}, but .*gpus={gpus} .* {words}: set"):
        list(ray_cluster.ray_actors(square, [(1,)], workers=1, device=device, gpus=gpus))


def test_an_error_in_a_worker_is_the_error_itself():
    with pytest.raises(ValueError, match=r"^7 is refused$"):
        list(ray_cluster.ray_actors(refuse, [(7,)], workers=1, device="cpu", cpus=0.5))


def test_a_killed_process_of_the_local_engine_ends_in_one_sentence():
    with pytest.raises(ValueError, match=r"a worker process was killed .* run the job again"):
        list(workers.processes(die, [(1,), (2,)], workers=1, device="cpu"))
    found = list(workers.processes(square, [(x,) for x in range(5)], workers=2, device="auto"))
    assert sorted(found) == [0, 1, 4, 9, 16]
