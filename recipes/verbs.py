"""What stands before or after a job in `just sweep`, `just stage2` and `just synthesize`.

    python recipes/verbs.py sweep recipes/demo limit=20 out=out/try/evals
    python recipes/verbs.py gate recipes/demo checkpoint=out/other/epoch_0
    python recipes/verbs.py synthesize recipes/demo --dry-run

sweep: stages.evaluate with these arguments, then stages.report of what it wrote. gate: whether the
checkpoint that a stage 2 with these arguments begins with may go on; gate=false asks nothing.
synthesize: stages.curate_texts, then stages.synthesize_instructions with these arguments. `--help`
prints the help of both jobs and runs neither.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def job(name: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", f"stages.{name}", *arguments]).returncode


def value_of(arguments: list[str], key: str) -> Any:
    """Return the value of the last key=value, as the job will read it; None without one."""
    values = [a.partition("=")[2] for a in arguments if a.startswith(f"{key}=")]
    return yaml.safe_load(values[-1]) if values else None


def is_dry(arguments: list[str]) -> bool:
    return "--dry-run" in arguments or value_of(arguments, "runtime.dry_run") is True


def sweep(recipe: Path, arguments: list[str]) -> int:
    code = job("evaluate", f"{recipe}/evaluate.yaml", *arguments)
    if code not in (0, 1) or is_dry(arguments):  # 1: some cells failed, which the report says
        return code
    part = [f"{key}={value}" for key in ("limit", "only") if (value := value_of(arguments, key))]
    more = [f"partial={' '.join(part)}".replace("'", "")] if part else []
    if evals := value_of(arguments, "out"):
        place = Path(evals)
        out = place.parent if place.name == "evals" else place.with_name(f"{place.name}_report")
        more += [f"evals={evals}", f"out={out}"]
    return job("report", f"{recipe}/report.yaml", *more) or code


def gate(recipe: Path, arguments: list[str]) -> int:
    path = recipe / "gate.yaml"
    if not path.exists() or value_of(arguments, "gate") is False:
        return 0
    judged, stage2 = (yaml.safe_load(p.read_text()) for p in (path, recipe / "stage2.yaml"))
    if (Path(value_of(arguments, "out") or stage2["out"]) / "manifest.json").exists():
        return 0  # it is complete, or will be refused
    if is_dry(arguments):
        print("gate: not asked in a dry run")
        return 0
    begins = value_of(arguments, "checkpoint") or stage2["checkpoint"]
    if begins != judged.get("path", begins):
        print(
            f"gate: not asked, as {path} judges {judged['path']} and this run begins with {begins}"
        )
        return 0
    only = f"only=[{judged['base']},{judged['checkpoint'].partition('/')[0]}]"
    same = [a for a in arguments if a.startswith(("runtime.threads=", "runtime.device="))]
    return job("evaluate", f"{recipe}/evaluate.yaml", only, *same) or job("gate", str(path))


def synthesize(recipe: Path, arguments: list[str]) -> int:
    for world in (recipe / "world", recipe / "dialogues"):  # seconds, in a dry run too
        if world.with_suffix(".py").exists():
            paths = [str(world.with_suffix(suffix)) for suffix in (".py", ".yaml")]
            if code := subprocess.run([sys.executable, *paths]).returncode:
                return code
    texts = recipe / "curate_texts.yaml"
    manifest = Path(yaml.safe_load(texts.read_text())["out"]) / "manifest.json"
    dry = is_dry(arguments) and not manifest.exists()
    fresh = [a for a in arguments if a.startswith("fresh=")]  # both move aside only what differs
    if code := job("curate_texts", str(texts), *["--dry-run"] * dry, *fresh):
        return code
    if dry:
        print(
            "What is spoken is planned when the texts are chosen: "
            f"`.venv/bin/python -m stages.curate_texts {texts}` first"
        )
        return 0
    return job("synthesize_instructions", f"{recipe}/synthesize.yaml", *arguments)


VERBS = {  # what is run, and the jobs behind it
    "sweep": (sweep, ("evaluate", "report")),
    "gate": (gate, ()),  # stage 2 prints its own help
    "synthesize": (synthesize, ("curate_texts", "synthesize_instructions")),
}

if __name__ == "__main__":
    try:
        (verb, jobs), recipe, arguments = VERBS[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:]
        if {"--help", "-h"} & {*arguments}:
            sys.exit(max((job(name, "--help") for name in jobs), default=0))
        sys.exit(verb(recipe, arguments))
    except KeyboardInterrupt:
        sys.exit(130)
