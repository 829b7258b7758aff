"""Which first values of the new rows are best, and whether to train them alone at first.

    just bench new_rows            (after `just data`; about 6 minutes a row on two quiet cores)

The demo's stages 1 and 2, shorter or longer as the keys say, from the same base once for every way
to begin: text knowledge is checked after both, spoken questions after stage 2. Keys: choices=a,b
(names below), first=0,100 (steps that train the new rows alone), epochs=3 (of stage 1), epochs2=1
(of stage 2), seeds=0 (several: 0,1,2; of rows and data), steps=N (a trial: both stages end after
N), threads=0 (all cores), out=FOLDER. Data are those of out/data. Every job is a no-op where it has
been done, so a bench that was stopped goes on, and more choices or seeds add to the table.
"""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

CHOICES = {
    "normal": "{_component_: speechfuse.tokens.normal}",
    "mean": "{_component_: speechfuse.tokens.mean}",
    "mean_and_covariance": "{_component_: speechfuse.tokens.mean_and_covariance}",
    "mean_and_covariance_1": "{_component_: speechfuse.tokens.mean_and_covariance, scale: 1.0}",
    "codebook": "{_component_: speechfuse.tokens.codebook}",
}
DEFAULTS = {
    "choices": ",".join(CHOICES),
    "first": "0,100",
    "epochs": "3",
    "epochs2": "1",
    "seeds": "0",
    "steps": "",
    "threads": "0",
    "out": "out/bench_new_rows",
}
FEW = 10  # steps that a loss is the mean of
QUESTIONS = "unseen_facts_unseen_voices"
COLUMNS = (
    "sound loss, steps 1-10",
    "at 100",
    "last 10",
    "below ln(codes) at step",
    "text after stage 1",
    "text after stage 2",
    "spoken QA",
    "question WER",
)


def do(*command: str) -> None:
    print("$", *command, flush=True)
    if (code := subprocess.run([sys.executable, *command]).returncode) != 0:
        sys.exit(f"that ended with status {code}; run again to go on")


def train(options: dict[str, str], folder: Path, choice: str, first: str, seed: str) -> None:
    """Every job of one row of the table."""
    base = Path(options["out"]) / f"seed_{seed}" / f"expanded_{choice}"
    demo, more = "recipes/demo", [f"seed={seed}", f"runtime.threads={options['threads']}"]
    more += [f"steps={options['steps']}"] if options["steps"] else []
    do(
        "-m",
        "stages.expand_vocab",
        f"{demo}/expand_vocab.yaml",
        f"out={base}",
        f"seed={seed}",
        f"initialize={CHOICES[choice]}",
    )
    do(
        "-m",
        "stages.train",
        f"{demo}/stage1.yaml",
        f"out={folder}/stage1",
        f"checkpoint={base}",
        f"epochs={options['epochs']}",
        f"new_rows_first={first}",
        *more,
    )
    if len(lines := metrics(folder)) <= int(first):
        sys.exit(
            f"first={first}, but stage 1 has {len(lines)} steps: it would train the new rows alone;"
            " give more epochs, or fewer steps to first"
        )
    (last,) = sorted(folder.glob("stage1/epoch_*"))[-1:]
    do(
        "-m",
        "stages.train",
        f"{demo}/stage2.yaml",
        f"out={folder}/stage2",
        f"checkpoint={last}",
        f"epochs={options['epochs2']}",
        *more,
    )
    scored = (
        f"{{name: stage1, path: {last}, tasks: [text_mmlu]}}",
        f"{{name: stage2, path: {folder}/stage2, tasks: [text_mmlu, spoken_qa]}}",
    )
    do(
        "-m",
        "stages.evaluate",
        f"{demo}/evaluate.yaml",
        f"out={folder}/evals",
        f"checkpoints=[{', '.join(scored)}]",
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "stage1/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def codes(folder: Path) -> int:
    (config,) = sorted(folder.glob("stage1/epoch_*/config.json"))[-1:]
    return int(json.loads(config.read_text())["speechfuse"]["codes"])


def found(folder: Path) -> list[float]:
    """The numbers of a row of the table, in the order of COLUMNS."""
    losses = [line["loss_sound"] for line in metrics(folder)]
    means = [statistics.mean(losses[max(0, i - FEW) : i]) for i in range(1, len(losses) + 1)]
    below = [i for i, mean in enumerate(means, 1) if mean < math.log(codes(folder))]
    (end,) = sorted(folder.glob("evals/stage2/epoch_*"))[-1:]
    text = [
        json.loads((cell / "text_mmlu.json").read_text())["items"]
        for cell in (folder / "evals/stage1", end)
    ]
    spoken = json.loads((end / "spoken_qa.json").read_text())["scores"]
    scores = {(score["task"], score["split"], score["metric"]): score["value"] for score in spoken}
    return [
        means[min(FEW, len(means)) - 1],
        means[min(100, len(means)) - 1],
        means[-1],
        below[0] if below else math.nan,
        *(float(statistics.mean(item["correct"] for item in items)) for items in text),
        scores["spoken_qa", QUESTIONS, "acc"],
        scores["question_transcript", "unseen_voices", "wer"],
    ]


def shown(values: list[float]) -> str:
    """Of one seed the value, of several their mean and range."""
    if any(math.isnan(value) for value in values):
        return "not in every run" if len(values) > 1 else "never"
    form = ".0f" if isinstance(values[0], int) else ".3f"
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if unknown := given.keys() - DEFAULTS.keys():
        sys.exit(f"error: unknown key {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    choices, firsts, seeds = (options[key].split(",") for key in ("choices", "first", "seeds"))
    if unknown := set(choices) - CHOICES.keys():
        sys.exit(f"error: choices={', '.join(unknown)}: there are {', '.join(CHOICES)}")
    if not Path("out/data/speech_train/manifest.json").exists():
        sys.exit("no out/data/speech_train: run `just data` first")
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for seed in seeds:
        for choice in choices:
            for first in firsts:
                folder = Path(options["out"]) / f"seed_{seed}" / f"{choice}-{first}"
                train(options, folder, choice, first, seed)
                rows.setdefault((choice, first), []).append(found(folder))
    print(f"\n{options}; guessing among {codes(folder)} codes: {math.log(codes(folder)):.2f}\n")
    print(f"| initialize | alone at first | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for (choice, first), values in rows.items():
        cells = [shown(list(column)) for column in zip(*values, strict=True)]
        print(f"| {choice} | {first} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
