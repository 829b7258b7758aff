"""One table of the ways of fusing speech into one language model, with what each costs.

    python -m stages.compare recipes/demo/compare.yaml

In: results of stages.evaluate, and the manifests of the trainings behind them. Out, rewritten each
time: report.json (a line for each score, as stages.report writes them), and compare.md and
compare.html: the table, a plot of what is heard against what text is kept, and which to take. Of a
row with several epochs the one counts that is best by `rule`. With transcripts_of=NAME the words
that this row heard are written to <out>/transcripts, for a cascade to read, and nothing else.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.report import choice, comparison, results, sections
from speechfuse.report.comparison import Row
from speechfuse.report.media import Media
from speechfuse.report.results import Checkpoint, Measure
from speechfuse.scores.intervals import Score


@dataclass
class Runtime:
    device: str = key("where the first token is timed: cpu, cuda, or auto", "auto")
    threads: int = key("CPU threads for that; 0: as torch has", 0, least=0)


@dataclass
class Compare:
    out: str = key("folder of the table")
    evals: str = key("folder of the result files")
    rows: list[Row] = key("entries {name, about, trainings, ...}, in order")
    base: str = key("the row of the language model before any training, which text refers to")
    rule: Measure = key("{task, split, metric} that the epoch of a row is chosen by")
    listening: Measure = key("{task, split, metric} that says how well a row listens")
    text: list[Measure] = key("scores of text; those while listening end in _speech_on")
    more: list[Measure] = key("further columns", [])
    heard: list[str] = key("tasks whose scores a cascade has of its recognizer", [])
    legend: dict[str, str] = key("what names of scores mean", {})
    quantizer: str | None = key("encoder of the question; null: no time to first token", None)
    question: str = key("what is asked for the time to first token", "")
    transcripts_of: str | None = key("write what this row heard, and stop", None)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        for measure in (self.listening, *self.text):
            if results.lower_is_better(measure.metric):
                raise ValueError(
                    f"{' '.join(results.key(measure))}: of listening and text the higher value is "
                    "to be the better one; put this one into more"
                )
        names = [row.name for row in self.rows]
        for row in self.rows:
            if not (row.checkpoint or row.trainings):
                raise ValueError(f"rows: {row.name} needs trainings or a checkpoint")
            for what, other in (("recognizer", row.recognizer), ("base", row.base)):
                if other and other not in names:
                    raise ValueError(f"rows: {row.name}: no row is its {what}, {other}")
            if names.count(row.name) > 1:
                raise ValueError(f"rows: the name {row.name} comes twice")
        if not self.text:
            raise ValueError("text is empty: name scores of text")


def chosen_of(job: Compare, every: dict[str, Checkpoint], row: Row) -> str | None:
    """Return the checkpoint that stands for a row; None where none of its results is there, or of
    one that no training made the score it would be chosen by."""
    names, of = results.of_run(every, row.name), results.key(job.rule)
    if not names or (row.checkpoint and all(of not in every[name].scores for name in names)):
        return None
    rule = choice.Rule(row.name, **asdict(job.rule), paired=False)
    return choice.choose(every, rule, None, []).checkpoint


def write_transcripts(job: Compare, checkpoint: Checkpoint) -> None:
    """Write {id, text} lines of what a checkpoint heard, a file for each of its tasks that say it.
    Raises ValueError where none does."""
    files = [f for f in checkpoint.files.values() if f.items and "heard" in f.items[0]]
    for file in files:
        lines = (json.dumps({"id": item["id"], "text": item["heard"]}) for item in file.items)
        path = Path(job.out) / "transcripts" / f"{file.name}.jsonl"
        artifact.write_atomic(path, "".join(f"{line}\n" for line in lines))
        print(f"{path}: {len(file.items):,} transcripts of {file.checkpoint}")
    if not files:
        raise ValueError(f"transcripts_of={job.transcripts_of}: no task has what it heard")


def trained(row: Row) -> list[Score]:
    """Return what the trainings of a row took: parameters trained (the most of one training; a run
    from before they were counted has none), tokens, and minutes of steps."""
    sums = dict.fromkeys(("tokens", "minutes", "parameters"), 0.0)
    for run in row.trainings:
        totals = artifact.manifest_of(Path(run))["totals"]
        lines = (Path(run) / "metrics.jsonl").read_text("utf-8").splitlines()
        sums["tokens"] += totals["tokens"]
        sums["minutes"] += sum(json.loads(line)["seconds"] for line in lines) / 60
        sums["parameters"] = max(sums["parameters"], totals.get("trained_parameters", 0))
    runs = len(row.trainings)
    counted = {name: value for name, value in sums.items() if value}
    return [Score("training", "all", n, v, v, v, runs) for n, v in counted.items()]


def folder_of(row: Row, checkpoint: str) -> Path:
    """Return the folder of a row's checkpoint: an epoch of its last training, or its own."""
    return Path(row.checkpoint or f"{row.trainings[-1]}{checkpoint.removeprefix(row.name)}")


def first_tokens(job: Compare, rows: list[Row], folders: dict[str, Path]) -> dict[str, list[Score]]:
    """Return the seconds from a waveform in memory to the first token of the reply, of the rows
    that listen."""
    from speechfuse import workers
    from speechfuse.audio import espeak_ng
    from speechfuse.evals import generation, latency  # torch with it
    from speechfuse.quantizer import foreign
    from speechfuse.quantizer.model import Quantizer

    device = next(iter(workers.gpus(job.runtime.device)), "cpu")
    workers.use(device, job.runtime.threads)
    quantizer = Quantizer.load(Path(str(job.quantizer))).to(device)
    with espeak_ng.EspeakLibrary() as engine:
        voice = espeak_ng.EspeakVoice("en-us+Annie", 170, 50)
        waveform = espeak_ng.speak(engine, job.question, voice).waveform
    asked = {}
    for row in rows:  # an encoder that trained with the rest lies beside it
        own = folders[row.name] / "encoder"
        encoder = foreign.trained(own).to(device) if own.is_dir() else quantizer
        asked[row.name] = latency.Asked(encoder, row.prompt, waveform)
    scores = {}
    for row in rows:
        ears = row.recognizer or row.name
        if row.listens and ears in folders:
            try:
                identity = asked[ears].encoder.identity
                hears = generation.generator(folders[ears], identity, "the question", device)
            except ValueError as error:  # it hears by another encoder than `quantizer`
                print(f"{row.name}: no time to first token: {error}")
                continue
            reads = row.recognizer and generation.generator(folders[row.name], None, "", device)
            numbers = latency.first_token(hears, asked[ears], reads)
            scores[row.name] = [Score("first_token", "all", "seconds", *numbers, latency.TIMES)]
    return scores


def main(job: Compare) -> None:
    found = results.read(Path(job.evals), None, [])
    every = found.of("clean")
    chosen = {row.name: name for row in job.rows if (name := chosen_of(job, every, row))}
    if job.transcripts_of:
        if job.transcripts_of not in chosen:
            raise ValueError(f"transcripts_of={job.transcripts_of}: {job.evals} has no such row")
        write_transcripts(job, every[chosen[job.transcripts_of]])
        return
    rows = [row for row in job.rows if row.name in chosen]
    for base in (job.base, *(row.base for row in rows if row.base)):
        if base not in chosen:
            raise ValueError(f"base={base} has no results in {job.evals}: evaluate it first")
    folders = {row.name: folder_of(row, chosen[row.name]) for row in rows}
    # a trained speech part that can be off lies beside its language model
    parts = {name for name, folder in folders.items() if (folder / "speech.json").exists()}
    separable = parts | {row.name for row in rows if row.checkpoint}
    of = {name: every[checkpoint] for name, checkpoint in chosen.items()}
    table = comparison.Table(rows, of, job.base, job.listening, job.text, separable)
    first = first_tokens(job, rows, folders) if job.quantizer else {}
    for row in rows:
        table.add(row.name, [*trained(row), *first.get(row.name, [])])
        if row.recognizer in chosen:  # what it hears is what its recognizer hears
            heard = of[row.recognizer].scores.values()
            table.add(row.name, [score for score in heard if score.task in job.heard])
    media, out = Media(Path(job.out)), Path(job.out)
    about = {row.name: f"{row.about} ({chosen[row.name]})" for row in rows}
    lacking = [row.name for row in job.rows if row.name not in chosen]
    rule = f"Of its epochs each row shows the best by {' '.join(asdict(job.rule).values())}."
    failed = [f"{failure.checkpoint} {failure.task}" for failure in found.failures]
    gaps = {"not evaluated yet": lacking, "failed, and not shown": failed}
    left = "; ".join(f"{why}: {', '.join(names)}" for why, names in gaps.items() if names)
    rule += f" {left[:1].upper()}{left[1:]}." * bool(left)
    rule += " Some scores are of a part of the items alone." * bool(sections.partial(of, ""))
    markdown = table.markdown(job.more, about, job.legend, rule, media)
    sentences = table.sentences()
    best = table.best(table.listeners)[0] if sentences else None
    lines = [
        {"checkpoint": row.name, "chosen": row.name == best, "epoch": chosen[row.name]}
        | {name: value for name, value in asdict(score).items() if name != "paired"}
        for row in rows
        for score in table.scores(row.name)
    ]
    for name, data in media.files.items():
        artifact.write_atomic(out / name, data)
    artifact.write_json(out / "report.json", lines)
    artifact.write_atomic(out / "compare.md", markdown)
    artifact.write_atomic(out / "compare.html", media.page("compare", markdown))
    for what, sentence in sentences.items():
        print(f"{what}: {sentence}")
    print(f"{out / 'compare.html'}: {len(rows)} rows{'; ' * bool(left)}{left}")


if __name__ == "__main__":
    config.main(main, Compare, __doc__)
