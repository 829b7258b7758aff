"""Kill sweeps at random moments, break a checkpoint, and look for answers that are shared.

    just prove sweep       (some minutes on two cores)

A sweep of three tiny epochs over speech and MMLU is run undisturbed, then again with SIGKILL at
five random moments, then with a process for each core and SIGKILL once, then with one epoch's
weights cut short. And two epochs are asked the same questions through lm-eval's own use_cache,
which gives the second the answers of the first. The last line says how much of it was kept.
"""

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.sweep_parts import make, results, start

KILLS = 5


def lines(out: Path) -> int:
    """Predictions that are on disk, whole or not."""
    return sum(path.read_bytes().count(b'"id"') for path in out.glob("cells/*/predictions.jsonl"))


def whole(out: Path) -> dict[str, Counter]:
    """Items of whole batches by cell; each is there once unless it was computed twice."""
    found = {}
    for path in out.glob("cells/*/predictions.jsonl"):
        data = path.read_bytes()
        kept = data[: data.rfind(b"\n\n") + 1].split(b"\n")
        found[path.parent.name] = Counter(json.loads(line)["id"] for line in kept if line)
    return found


def killed(config: dict[str, Any], at: int, *overrides: str) -> bool:
    """Start a sweep and kill it, and its workers, once `at` predictions are on disk."""
    out = Path(config["out"])
    process = start(config, *overrides)
    while process.poll() is None:
        if lines(out) >= at:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.001)
    process.communicate()
    return False


def finished(config: dict[str, Any], *overrides: str) -> tuple[int, str, str]:
    process = start(config, *overrides)
    out, err = process.communicate()
    return process.returncode, out, err


def resumed(config: dict[str, Any], reference: dict[str, Any], total: int, say: str) -> list[bool]:
    """Kill the sweep at random moments, finish it, and compare."""
    out, computed, stops = Path(config["out"]), Counter[str](), 0
    for at in sorted(random.sample(range(1, total), KILLS)):
        before = whole(out)
        stops += killed(config, max(at, lines(out) + 1))
        after = whole(out)
        for cell, ids in before.items():  # what was complete is still there, as it was
            computed[cell] += sum((ids - after.get(cell, Counter())).values())
    left = total - sum(sum(ids.values()) for ids in whole(out).values())
    code, told, _ = finished(config)
    once = all(count == 1 for ids in whole(out).values() for count in ids.values())
    asked = f"{left:,} items computed" in told
    same = results(out) == reference
    print(
        f"{say}: {stops} kills, {left} of {total} items left for the last start; scores and items"
        f" {'identical' if same else 'DIFFER'}, {sum(computed.values())} completed items computed"
        f" again"
    )
    return [code == 0 and same, once and asked and not computed.total() and stops == KILLS]


def shared_by_lm_eval(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """(answers that lm-eval's cache gives both epochs, answers that are the same without it)."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"say {i} {i + 1}"}) + "\n" for i in range(40)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "say.yaml").write_text(
        json.dumps(
            {
                "task": "say",
                "dataset_path": "json",
                "test_split": "test",
                "dataset_kwargs": {
                    "data_files": {"test": str(rows)},
                    "cache_dir": str(folder / "arrow"),
                },
                "output_type": "generate_until",
                "doc_to_text": "{{q}}",
                "doc_to_target": "{{q}}",
                "generation_kwargs": {"max_gen_toks": 5, "do_sample": False, "until": ["\n\n\n"]},
                "metric_list": [
                    {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
                ],
                "metadata": {"version": 1.0},
            }
        )
    )
    run = Path(config["checkpoints"][0]["path"])

    def said(epoch: int, cache: str | None) -> list[str]:
        checkpoint = run / f"epoch_{epoch}"
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            made = lm_eval.simple_evaluate(
                HFLM(model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=8),
                tasks=["say"],
                use_cache=cache,
                bootstrap_iters=0,
                task_manager=TaskManager(include_defaults=False, include_path=folder / "tasks"),
            )
        return [sample["resps"][0][0] for sample in made["samples"]["say"]]

    cached = [said(epoch, str(folder / "cache")) for epoch in (0, 1)]
    alone = [said(epoch, None) for epoch in (0, 1)]
    return tuple(sum(a == b for a, b in zip(*pair, strict=True)) for pair in (cached, alone))


def main() -> None:
    random.seed(0)
    kept: list[bool] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make(folder, epochs=3)
        code, told, err = finished(config)
        assert code == 0, err
        reference, total = results(folder / "evals"), lines(folder / "evals")
        print(f"undisturbed: {told.strip().splitlines()[-1]}")
        kept += resumed({**config, "out": str(folder / "killed")}, reference, total, "killed")

        shared = {**config, "out": str(folder / "shared")}
        stopped = killed(shared, total // 3, "runtime.processes=2")
        code, *_ = finished(shared, "runtime.processes=2")
        kept.append(stopped and code == 0 and results(folder / "shared") == reference)
        print(f"two processes, killed once: {'identical' if kept[-1] else 'DIFFER'}")

        weights = folder / "run" / "epoch_1" / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[: len(data) // 2])
        broken = {**config, "out": str(folder / "broken")}
        code, _, err = finished(broken)
        found = results(folder / "broken")
        others = {name: cell for name, cell in reference.items() if "epoch_1" not in name}
        named = [line for line in err.splitlines() if line.startswith("error: run/epoch_1 ")]
        failed = {f"run/epoch_1/{task}.failed.json" for task in ("asr", "mmlu")}
        kept.append(
            code == 1
            and len(named) == 2
            and found.keys() == others.keys() | failed
            and all(found[name] == cell for name, cell in others.items())
        )
        print(
            f"one epoch cut short: exit status {code}, {len(others)} other cells "
            f"{'whole' if kept[-1] else 'NOT WHOLE'}; {named[:1]}"
        )
        weights.write_bytes(data)

        keys = [
            json.loads(path.read_text())["fingerprints"]["predictions"]
            for path in (folder / "evals").rglob("asr.json")
        ]
        said = [
            [item["answer"] for item in reference[f"run/epoch_{e}/asr.json"][1]] for e in (0, 1)
        ]
        ours = sum(a == b for a, b in zip(*said, strict=True))
        leaked, alike = shared_by_lm_eval(folder, config)
        kept.append(len(set(keys)) == 3 and ours < len(said[0]) // 2)
        kept.append(leaked == 40 and alike < 20)
        print(
            f"two epochs in one sweep give {ours} of {len(said[0])} answers alike, from cells of "
            f"their own; through lm-eval's use_cache {leaked} of 40, without it {alike} of 40"
        )
    print(
        f"{sum(kept)} of {len(kept)} kept: identical scores after kills, nothing computed twice, "
        "two processes, one broken checkpoint alone, cells of their own, lm-eval's leak shown"
    )
    if not all(kept):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
