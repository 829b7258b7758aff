"""What encoding once saves a sweep, and MMLU against plain lm-eval, each in one run.

    just bench sweep [clips=200 questions=20]       (about 10 minutes on two cores)

Five epochs of the demo's base answer speech: codes made once for all of them, against codes made
again for every epoch, as harnesses do that encode inside the model. The clips are noise of 3 s, as
neither side's work depends on what is said; a Whisper of medium size costs a thousand times the
demo's quantizer, so there the ratio is nearer to 5. MMLU items per second are of the demo's base,
as it is and with Llama 3's 128,256 rows of vocabulary, by one evaluate() of lm-eval and by our
task; both with the data loaded, in turns, medians of three (one). Answers are compared item by
item.
"""

import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate as plain_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechfuse.audio import decoding
from speechfuse.evals import sweep
from speechfuse.evals.harness import Harness
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import shards
from speechfuse.tokens import expansion
from stages import evaluate
from tests.mmlu_folder import write_mmlu
from tests.small_training import ROOT, dataset
from tests.sweep_parts import SPEECH, copy, results

EPOCHS, ROUNDS = 5, 3
DEMO = ROOT / "recipes/demo/models"


def quietly(function: Any, *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """(seconds, what it gives) of a call, without its progress bars."""
    began = time.perf_counter()
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        made = function(*args, **kwargs)
    return time.perf_counter() - began, made


def encode(quantizer: Quantizer, waveforms: list[np.ndarray], out: Path) -> Path:
    rows = [
        {"id": f"c{i}", "codes": codes, "seconds": 3.0, "text": "four five", "extra": "{}"}
        for i, codes in enumerate(quantizer.encode(waveforms, 16))
    ]
    return dataset(out, shards.SPEECH, rows, quantizer.stream)


def swept(folder: Path, run: Path, data: Path, name: str, *only: str) -> None:
    job = sweep.Evaluate(
        out=str(folder / name),
        checkpoints=[{"name": "run", "path": str(run), "tasks": ["asr"]}],
        tasks={
            "asr": {"_component_": SPEECH, "data": str(data), "metric": "wer", "max_new_tokens": 16}
        },
        only=list(only),
        runtime=sweep.Runtime(device="cpu"),
    )
    evaluate.main(job)


def encode_once(folder: Path, clips: int) -> tuple[float, float]:
    """Seconds of five epochs with codes made once, and with codes made for every epoch."""
    quantizer = Quantizer.load(DEMO / "quantizer")
    expansion.expand(
        DEMO / "base",
        folder / "expanded",
        quantizer.codebook_size,
        quantizer.identity,
        0,
        {"_component_": "speechfuse.tokens.mean_and_covariance"},
    )
    for epoch in range(EPOCHS):
        copy(folder / "expanded", folder / "run" / f"epoch_{epoch}", epoch + 1)
    (folder / "run" / "manifest.json").write_text("{}")
    noise = np.random.default_rng(0).normal(0, 0.1, (clips, 3 * decoding.SAMPLE_RATE))
    waveforms = list(noise.astype(np.float32))
    warm = encode(quantizer, waveforms[:16], folder / "warm")
    quietly(swept, folder, folder / "run", warm, "warm_evals", "run/epoch_0")

    def once() -> None:
        data = encode(quantizer, waveforms, folder / "once")
        swept(folder, folder / "run", data, "once_evals")

    def again() -> None:
        for epoch in range(EPOCHS):
            data = encode(quantizer, waveforms, folder / f"again_{epoch}")
            swept(folder, folder / "run", data, "again_evals", f"run/epoch_{epoch}")

    seconds = quietly(once)[0], quietly(again)[0]
    first, second = results(folder / "once_evals"), results(folder / "again_evals")
    assert first == second and len(first) == EPOCHS
    return seconds


def mmlu(checkpoint: Path, task: Harness, rounds_of: int) -> tuple[float, float, int, int]:
    """(items/s of plain lm-eval, ours, items, answers alike)."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with redirect_stderr(StringIO()):
        lm = HFLM(model, tokenizer=tokenizer, batch_size=task.batch_size)
    ids = task.ids()
    list(task.predict(checkpoint, ids[:2]))  # the model is loaded once for all tasks

    def plain() -> dict[str, Any]:
        return plain_evaluate(lm, {"tasks": task.loaded}, bootstrap_iters=0)["samples"]

    def ours() -> list[dict[str, Any]]:
        return [said for batch in task.predict(checkpoint, ids) for said in batch]

    rounds = [(quietly(plain), quietly(ours)) for _ in range(rounds_of)]
    (_, theirs), (_, said) = rounds[-1]
    chosen = {}
    for name, samples in theirs.items():
        for sample in samples:
            logs = [log for log, _ in sample["filtered_resps"]]
            chosen[f"{name}/{sample['doc_id']}"] = logs.index(max(logs))
    alike = sum(chosen[entry["id"]] == entry["said"] for entry in said)
    speeds = [statistics.median(len(ids) / turn[i][0] for turn in rounds) for i in range(2)]
    return speeds[0], speeds[1], len(ids), alike


def with_llama_3_vocabulary(out: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    model.resize_token_embeddings(128_256, mean_resizing=False)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(DEMO / "base").save_pretrained(out)
    return out


def main() -> None:
    options = {"clips": "200", "questions": "20"}
    options |= dict(argument.split("=", 1) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once, again = encode_once(folder, int(options["clips"]))
        print(
            f"5 epochs, {options['clips']} clips: codes made once {once:.1f} s, for every epoch "
            f"{again:.1f} s: {again / once:.2f} times as long"
        )
        task = Harness("mmlu", str(write_mmlu(folder / "mmlu", test=int(options["questions"]))), 0)
        quietly(lambda: task.loaded)
        some = replace(task, batch_size=4)  # the logits of all positions are 1 GB in batches of 16
        some.__dict__.update({"loaded": task.loaded, "_groups": task._groups})
        wide = with_llama_3_vocabulary(folder / "wide")
        for said, checkpoint, of, rounds in (
            ("the demo's base, 943 rows of vocabulary", DEMO / "base", task, ROUNDS),
            ("the same with 128,256 rows", wide, some, 1),
        ):
            plain, ours, items, alike = mmlu(checkpoint, of, rounds)
            print(
                f"MMLU, {said}: plain lm-eval {plain:.1f} items/s, ours {ours:.1f}: "
                f"{ours / plain:.2f} times as many; {alike} of {items} answers identical"
            )


if __name__ == "__main__":
    main()
