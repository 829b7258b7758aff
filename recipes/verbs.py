"""The verbs of several jobs: which jobs, with which arguments, in which order.

    python recipes/verbs.py sweep recipes/demo limit=20 out=out/try/evals
    python recipes/verbs.py demo recipes/demo ranks=2

A verb is a function that yields its jobs as (name, argument, ...). First the configuration of each
is read (`--check`), so that a typo in the last one costs nothing; then they run, up to the first
that fails. Failed cells of an evaluation do not end a verb: the report names them, and the exit
status is 1. With `--help` the help of each job is printed, and none is run. `ranks=N` reaches
trainings alone, `gate=false` lets stage 2 begin unasked. The demos take no key but runtime.threads
and runtime.device, which reach trainings and evaluations; `compare` also `steps` of each training
of its own, which then has no warm-up, and `limit` of its evaluations, for a small run (into the
same folders: in a clone to throw away).
"""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from speechfuse import config, yaml_values

Job = tuple[str, ...]  # a module of stages/, or a script beside its YAML; then arguments
Jobs = Iterator[Job]
ROOT = Path(__file__).parent.parent
SAY = "say"  # instead of a job: what a verb has to say
FEW = "steps=", "limit="  # of compare alone: a small run, to see that it works
WHISPER = Path("models/tiny.en.pt")  # the recognizer of a cascade
OTHERS = {  # further recordings to be tested with: what must be there for it
    "slt": "recipes/demo/slt",
    "people": "recipes/demo/people",
    "neural": "out/data/neural/manifest.json",
}


def value_of(arguments: list[str], key: str) -> Any:
    """Return the value of the last key=value, as the job will read it; None without one."""
    values = [a.partition("=")[2] for a in arguments if a.startswith(f"{key}=")]
    return yaml.safe_load(values[-1]) if values else None


def is_dry(arguments: list[str]) -> bool:
    return "--dry-run" in arguments or value_of(arguments, "runtime.dry_run") is True


def of_machine(arguments: list[str]) -> list[str]:
    """Return the arguments that trainings and evaluations share."""
    return [a for a in arguments if a.startswith(("runtime.threads=", "runtime.device="))]


def script(path: Path) -> Jobs:
    """Yield a recipe's own script with its YAML, where there is one."""
    if path.with_suffix(".py").exists():
        yield str(path.with_suffix(".py")), str(path.with_suffix(".yaml"))


def train(path: str, arguments: list[str]) -> Job:
    return "train", path, *(a for a in arguments if not a.startswith("gate="))


def others(recipe: Path, kind: str) -> Iterator[str]:
    """Yield the names of the OTHERS that the recipe has a `kind`_NAME.yaml of, and that are there
    when it is their turn."""
    for name, needed in OTHERS.items():
        if (recipe / f"{kind}_{name}.yaml").exists() and Path(needed).exists():
            yield name


def data(recipe: Path, arguments: list[str]) -> Jobs:
    for name in ("world", "neural"):
        yield from script(recipe / name)
    for name in ("train", "test"):
        yield "tokenize_speech", f"{recipe}/tokenize_{name}.yaml", *arguments
    for name in others(recipe, "tokenize"):  # of which corpus.* of the synthetic ones are no keys
        own = [a for a in arguments if not a.startswith("corpus.")]
        yield "tokenize_speech", f"{recipe}/tokenize_{name}.yaml", *own
    of_job = [a for a in arguments if a.startswith(("--", "fresh=", "runtime."))]
    yield from recognize(recipe, of_job)


def recognize(recipe: Path, arguments: list[str]) -> Jobs:
    """Yield what a cascade hears in the recordings to be tested with, where its Whisper is."""
    if not (recipe / "recognize_test.yaml").exists():
        return
    if not WHISPER.exists():
        yield SAY, f"no cascade, as {WHISPER} is not there: `just fetch-whisper tiny.en` gets it"
        return
    for name in ("test", *others(recipe, "recognize")):
        yield "recognize_speech", f"{recipe}/recognize_{name}.yaml", *arguments


def sweep(recipe: Path, arguments: list[str]) -> Jobs:
    evaluate, report = f"{recipe}/evaluate.yaml", f"{recipe}/report.yaml"
    yield "report", report, f"plan={evaluate}"
    yield "evaluate", evaluate, *arguments
    if is_dry(arguments):
        return
    part = [f"{key}={value}" for key in ("limit", "only") if (value := value_of(arguments, key))]
    more = [f"partial={' '.join(part)}".replace("'", "")] if part else []
    if evals := value_of(arguments, "out"):
        place = Path(evals)
        out = place.parent if place.name == "evals" else place.with_name(f"{place.name}_report")
        more += [f"evals={evals}", f"out={out}"]
    yield "report", report, *more


def gate(recipe: Path, arguments: list[str]) -> Jobs:
    """Yield what decides whether the checkpoint that a stage 2 with these arguments begins with may
    go on: the scores that the gate reads, and the gate."""
    path = recipe / "gate.yaml"
    if value_of(arguments, "gate") is False:
        return
    stage2 = yaml_values.settings(recipe / "stage2.yaml")
    if (Path(value_of(arguments, "out") or stage2["out"]) / "manifest.json").exists():
        return  # it is complete, or will be refused
    if not path.exists():
        yield SAY, f"gate: not asked, as {path} is not there"
        return
    if is_dry(arguments):
        yield SAY, "gate: not asked in a dry run"
        return
    judged = yaml_values.settings(path)
    begins = value_of(arguments, "checkpoint") or stage2["checkpoint"]
    if begins != judged.get("path", begins):
        yield (
            SAY,
            f"gate: not asked, as {path} judges {judged['path']} and this run begins with {begins}",
        )
        return
    names = {floor["task"] for floor in judged["floors"]}
    tasks = yaml_values.settings(recipe / "evaluate.yaml")["tasks"]
    gives = {task: {task, spec.get("name")} for task, spec in tasks.items()}
    for task in (task for task, spec in tasks.items() if spec.get("transcript_splits")):
        gives[task].add("question_transcript")
    if lost := sorted(names.difference(*gives.values())):
        raise ValueError(f"{path}: no task of {recipe}/evaluate.yaml scores {', '.join(lost)}")
    only = [judged["base"]] * any("of_base_at_least" in floor for floor in judged["floors"])
    only += [judged["checkpoint"], *(task for task, given in gives.items() if given & names)]
    yield "evaluate", f"{recipe}/evaluate.yaml", f"only=[{','.join(only)}]", *of_machine(arguments)
    yield "gate", str(path)


def stage2(recipe: Path, arguments: list[str]) -> Jobs:
    yield from gate(recipe, arguments)
    yield train(f"{recipe}/stage2.yaml", arguments)


def synthesize(recipe: Path, arguments: list[str]) -> Jobs:
    for world in ("world", "dialogues"):  # seconds, in a dry run too
        yield from script(recipe / world)
    texts = recipe / "curate_texts.yaml"
    made = Path(yaml_values.settings(texts)["out"]) / "manifest.json"
    dry = is_dry(arguments) and not made.exists()
    fresh = [a for a in arguments if a.startswith("fresh=")]  # both move aside only what differs
    yield "curate_texts", str(texts), *["--dry-run"] * dry, *fresh
    yield "synthesize_instructions", f"{recipe}/synthesize.yaml", *arguments, *["--check"] * dry
    if dry:
        yield (
            SAY,
            "What is spoken is planned when the texts are chosen: "
            f"`.venv/bin/python -m stages.curate_texts {texts}` first",
        )


def demo(recipe: Path, arguments: list[str]) -> Jobs:
    yield from data(recipe, [])
    yield "expand_vocab", f"{recipe}/expand_vocab.yaml"
    yield train(f"{recipe}/stage1.yaml", arguments)
    yield from stage2(recipe, arguments)
    yield from sweep(recipe, of_machine(arguments))
    yield SAY, f"to talk to it: just recipe={recipe.name} talk"


def demo_plain(recipe: Path, arguments: list[str]) -> Jobs:
    yield from demo(recipe, arguments)
    yield train(f"{recipe}/stage2_plain.yaml", arguments)
    yield "evaluate", f"{recipe}/evaluate_plain.yaml", *of_machine(arguments)
    yield "report", f"{recipe}/report.yaml"


def demo_seeds(recipe: Path, arguments: list[str]) -> Jobs:
    yield from demo(recipe, arguments)
    checkpoints = yaml_values.settings(recipe / "evaluate.yaml")["checkpoints"]
    at = {each["name"]: number for number, each in enumerate(checkpoints)}
    for seed in (1, 2):
        out, start = f"out/demo_{seed}", f"seed={seed}"
        one, two = f"{out}/stage1", f"{out}/stage2"
        begin = f"checkpoint={one}/epoch_0"
        scored = [
            f"checkpoints.{at['stage1']}.path={one}",
            f"checkpoints.{at['stage2']}.path={two}",
        ]
        runs = [f"runs.0.path={one}", f"runs.1.path={two}"]
        yield train(f"{recipe}/stage1.yaml", [*arguments, start, f"out={one}"])
        yield train(f"{recipe}/stage2.yaml", [*arguments, start, f"out={two}", begin])
        scored += [f"out={out}/evals", *of_machine(arguments)]
        yield "evaluate", f"{recipe}/evaluate.yaml", *scored
        yield "report", f"{recipe}/report.yaml", f"out={out}", f"evals={out}/evals", *runs
    yield from script(recipe / "seed_variance")


def demo_robust(recipe: Path, arguments: list[str]) -> Jobs:
    yield from demo(recipe, arguments)
    yield from synthesize(recipe, [])
    yield "curate_texts", f"{recipe}/curate_test.yaml"
    for snr in ("clean", 20, 10, 5, 0):
        noise = "augmentation=[]" if snr == "clean" else f"augmentation.0.snr=[{snr},{snr}]"
        out = f"out=out/data/instructions_test/{snr}"
        yield "synthesize_instructions", f"{recipe}/synthesize_test.yaml", out, noise
    quiet = (
        "augmentation=[{_component_: speechfuse.audio.Noise, snr: [20, 40], sources: [white]}, "
        "{_component_: speechfuse.audio.Gain, db: [-10, 0]}]"
    )
    out = "out/data/instructions_quiet"
    yield "synthesize_instructions", f"{recipe}/synthesize.yaml", f"out={out}", quiet
    yield train(f"{recipe}/stage2_robust.yaml", arguments)
    other = "out=out/demo_robust/stage2_quiet"
    yield train(f"{recipe}/stage2_robust.yaml", [*arguments, other, f"datasets.0.path={out}"])
    yield "evaluate", f"{recipe}/evaluate_robust.yaml", *of_machine(arguments)
    yield "report", f"{recipe}/report_robust.yaml"


def compare(recipe: Path, arguments: list[str]) -> Jobs:
    few = [a for a in arguments if a.startswith(FEW)]
    arguments = [a for a in arguments if a not in few]
    counts = [a for a in few if a.startswith("steps=")]  # maybe fewer than the warm-up has
    steps = [*arguments, *counts, *["warmup_steps=0"] * bool(counts)]
    scoring = [*of_machine(arguments), *(a for a in few if a.startswith("limit="))]
    if few:
        yield from demo(recipe, arguments)
        yield train(f"{recipe}/stage2_plain.yaml", steps)
    else:
        yield from demo_plain(recipe, arguments)
    noise = ["corpus.snr=[10,10]", "corpus.splits=[unseen_facts]"]
    alone = ["corpus.snr=[-60,-60]", "corpus.splits=[phrases]"]  # noise in which nobody is heard
    for name in ("train", "test", *others(recipe, "encode")):
        yield "encode_speech", f"{recipe}/encode_{name}.yaml"
    for name, keys in ("10_db", noise), ("noise", alone):
        speech, frames = (f"out=out/data/{kind}_test_{name}" for kind in ("speech", "frames"))
        yield "tokenize_speech", f"{recipe}/tokenize_test.yaml", speech, *keys
        yield "encode_speech", f"{recipe}/encode_test.yaml", frames, *keys
    if WHISPER.exists():
        heard = "out=out/data/heard_test_10_db"
        yield "recognize_speech", f"{recipe}/recognize_test.yaml", heard, *noise
    splices = ("splice_adapter", "splice_lora", "splice_lora_replay")
    for name in ("token_lora", *splices, "rwkv_adapter", "rwkv_prompt", "rwkv_state"):
        yield train(f"{recipe}/{name}.yaml", steps)
    begin = ["checkpoint=out/compare/rwkv_state/epoch_0"] * bool(counts)  # all that a small run has
    for name in ("transcribe", "answer", "count"):
        yield train(f"{recipe}/rwkv_states_{name}.yaml", [*steps, *begin])
    scores, table = f"{recipe}/evaluate_compare.yaml", f"{recipe}/compare.yaml"
    yield "evaluate", scores, "only=[token]", *scoring
    yield "compare", table, "transcripts_of=token", *of_machine(arguments)
    yield "evaluate", scores, *scoring
    yield "compare", table, *of_machine(arguments)


def demo_duplex(recipe: Path, arguments: list[str]) -> Jobs:
    yield from script(recipe / "world")
    yield "curate_texts", f"{recipe}/curate_duplex.yaml"
    for name, more in ("train", ""), ("test", "_test"):
        yield "build_duplex", f"{recipe}/duplex_{name}.yaml"
        of_name = [f"out=out/data/duplex_frames{more}", f"corpus.path=out/data/duplex_{name}"]
        yield "encode_speech", f"{recipe}/encode_duplex.yaml", *of_name
    yield train(f"{recipe}/duplex_lora.yaml", arguments)
    voice = [] if shutil.which("flite") else ["checkpoints.2=null"]  # the clean one is flite's
    yield "evaluate", f"{recipe}/evaluate_duplex.yaml", *voice, *of_machine(arguments)
    yield "report", f"{recipe}/report_duplex.yaml"


def train_quantizer(recipe: Path, arguments: list[str]) -> Jobs:
    yield from script(recipe / "world")
    yield "train_quantizer", f"{recipe}/train_quantizer.yaml", *arguments


def train_base(recipe: Path, arguments: list[str], kind: str = "base", epoch: int = 2) -> Jobs:
    yield from script(recipe / "world")
    yield f"{recipe}/init_base.py", f"{recipe}/init_{kind}.yaml"
    yield train(f"{recipe}/train_{kind}.yaml", arguments)
    scored = ["only=[base]", f"checkpoints.0.path=out/models/{kind}_training/epoch_{epoch}"]
    yield "evaluate", f"{recipe}/evaluate.yaml", *scored, "out=out/models/evals"


def train_rwkv(recipe: Path, arguments: list[str]) -> Jobs:
    yield from train_base(recipe, arguments, "rwkv", 1)


WHOLE = demo, demo_plain, demo_seeds, demo_robust, demo_duplex, compare  # take of_machine alone
VERBS: dict[str, Callable[[Path, list[str]], Jobs]] = {
    verb.__name__.replace("_", "-"): verb
    for verb in (data, synthesize, stage2, sweep, train_quantizer, train_base, train_rwkv, *WHOLE)
}


def command(job: Job) -> list[str]:
    """Return a job's command line, without the interpreter."""
    name, *arguments = job
    return [name, *arguments] if name.endswith(".py") else ["-m", f"stages.{name}", *arguments]


def check(job: Job) -> None:
    """Read a job's configuration in this process; exits with 2 where it is wrong."""
    name, *arguments = job
    sys.argv = [name, *arguments, "--check"]
    path = name if name.endswith(".py") else ROOT / "stages" / f"{name}.py"
    runpy.run_path(str(path), run_name="__main__")


def run(job: Job) -> int:
    if job[0] == SAY:
        print(job[1], flush=True)
        return 0
    return subprocess.run([sys.executable, *command(job)]).returncode


def main(name: str, recipe: Path, arguments: list[str]) -> int:
    verb, ranks = VERBS[name], value_of(arguments, "ranks") or 1
    arguments = [a for a in arguments if not a.startswith("ranks=")]
    if {"--help", "-h"} & {*arguments}:
        names = dict.fromkeys(job[0] for job in verb(recipe, []) if job[0] != SAY)
        return max(run((each, "--help")) for each in names)
    few = FEW if verb is compare else ()
    allowed = *of_machine(arguments), *(a for a in arguments if a.startswith(("gate=", *few)))
    if verb in WHOLE and (own := [a for a in arguments if a not in allowed]):
        keys = " and ".join(["runtime.threads", "runtime.device", *(key[:-1] for key in few)])
        raise ValueError(f"{own[0]}: just {name} takes {keys} alone; run its verbs one by one")
    if ranks != 1:
        arguments.insert(0, f"runtime.ranks={ranks}")
    for job in verb(recipe, arguments):
        if job[0] != SAY:
            check(job)
    failed = 0
    for job in verb(recipe, arguments):
        if code := run(job):
            if (job[0], code) != ("evaluate", 1):  # 1: some cells failed, which the report says
                return code
            failed = code
    return failed


if __name__ == "__main__":
    sys.exit(
        config.guarded(lambda: main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]), interrupted="")
    )
