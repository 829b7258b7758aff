"""Listen to a spoken dataset: one HTML page with a few samples of every kind.

    python -m stages.listen path=out/data/instructions

In: a finished dataset of stages.synthesize_instructions, which kept the audio of these samples.
Out: a page that needs no other file, with each sample's turns, its speech to be played, what was
done to it, its transcript by the round trip and its codes. Nothing is written into the dataset's
folder, and nothing that the dataset names is run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.report.page import Trusted, audio, data_uri, escape, html, place, table
from speechfuse.rows import shards
from speechfuse.synthesis.examples import EXAMPLES, example_name

Example = tuple[Path, int, dict[str, Any]]  # shard, number of the row, row


@dataclass
class Listen:
    path: str = key("folder of the dataset")
    out: str | None = key("the page; null: NAME.listen.html beside the folder", None)


def examples_by_kind(folder: Path) -> dict[str, list[Example]]:
    """The rows whose audio was kept, by the kind of sample. Raises ValueError when there is
    none."""
    kinds: dict[str, list[Example]] = {}
    for path in shards.shard_paths(folder):
        numbers = path.with_name(f"{path.stem}.{EXAMPLES}")
        chosen = set(json.loads(numbers.read_text("utf-8"))) if numbers.exists() else set()
        rows = enumerate(shards.read_shard(path) if chosen else [])
        for number, row in rows:
            if number in chosen:
                row["extra"] = json.loads(row["extra"])
                kinds.setdefault(row["extra"].get("kind", ""), []).append((path, number, row))
    if not kinds:
        raise ValueError(
            f"{folder} holds no audio to listen to: an earlier version made it, which kept "
            "none, or none of the samples that it was to keep came out"
        )
    return dict(sorted(kinds.items()))


def sample_table(path: Path, number: int, row: dict[str, Any]) -> str:
    """Markdown of one row: a line for each segment."""
    lines, piece = [], 0
    for turn in row["turns"]:
        for segment in turn["segments"]:
            speech = segment["speech"]
            if speech is None:
                lines.append((turn["role"], segment["text"], "", ""))
                continue
            extra, codes = json.loads(speech["extra"]), speech["codes"]
            flac = path.with_name(f"{path.stem}.{example_name(number, piece)}")
            sound = Trusted("no audio: the engine makes codes from text")
            if flac.exists():
                sound = audio(data_uri("audio/flac", flac.read_bytes()))
            text = speech["text"] or ""
            if "shuffled" in extra:
                text = f"codes out of order; the audio has them in order: {extra['shuffled']}"
            numbers = " ".join(map(str, codes))
            details = f"<details><summary>{len(codes)} codes</summary>{numbers}</details>"
            how = Trusted(escape(described(speech, extra)) + details)
            lines.append((turn["role"], text, sound, how))
            piece += 1
    about = {k: v for k, v in row["extra"].items() if k != "kind" and v not in (None, "")}
    caption = " · ".join([row["id"], *(f"{key} {value}" for key, value in about.items())])
    return table(["role", "text", "audio", "how"], lines, caption=escape(caption))


def described(speech: dict[str, Any], extra: dict[str, Any]) -> str:
    """Voice and duration of a piece of speech, its augmentation, and its transcript."""
    words = [speech["speaker"] or f"{extra.get('sound')}, {extra.get('level') or 'no'} dB"]
    words += [speech["language"] or "", f"{speech['seconds']:.2f} s"]
    if speech["parent"]:
        words.append(f"piece {speech['part']} of a text spoken in several")
    shown = ("augmentation", "heard", "wer", "sound", "level", "shuffled", "seconds")
    words += [f"{key} {value}" for key, value in extra.items() if key not in shown]
    for step in extra.get("augmentation", []):
        values = ", ".join(f"{key} {value}" for key, value in step.items() if key != "name")
        words.append(f"{step['name']} ({values})")
    if "wer" in extra:
        words.append(f"heard: “{extra['heard']}”, {extra['wer']:.0%} of the words wrong")
    return " · ".join(filter(None, words))


def figures(totals: dict[str, Any]) -> str:
    """Markdown table of the dataset's totals."""
    voices = totals["voices"]
    left_out = {**totals["rejected"], **totals["filtered"]}
    kinds = [f"{n} {of['made']:,} of {of['planned']:,}" for n, of in totals["kinds"].items()]
    worst = [
        f"{voice} {of['wer']:.1%} ({of['refused']} of {of['pieces']} left out)"
        for voice, of in list(totals["round_trip"].items())[:5]
    ]
    few, many = min(voices.values(), default=0), max(voices.values(), default=0)
    lines = {
        "samples": f"{totals['rows']:,} of {totals['samples']:,} planned",
        "kinds": "; ".join(kinds),
        "speech": f"{totals['hours']:.2f} h in {totals['pieces_of_speech']:,} pieces",
        "voices": f"{len(voices):,}, {few:,} to {many:,} pieces each",
        "sources": "; ".join(f"{name} {n:,}" for name, n in totals["sources"].items()),
        "licence": totals["licence"],
        "left out": "; ".join(f"{n:,} {why}" for why, n in left_out.items()) or "nothing",
        "round trip, worst": "; ".join(worst) or "not done",
    }
    return table(["dataset", ""], lines.items())


def main(job: Listen) -> None:
    folder = Path(job.path)
    manifest = artifact.manifest_of(folder)
    if manifest["job"] != "synthesize_instructions":
        raise ValueError(f"{folder} was made by {manifest['job']}, not by synthesize_instructions")
    name = folder.absolute().name
    out = place(job.path, folder, job.out, "listen")
    examples = examples_by_kind(folder)
    sections = [f"# {escape(name)}", figures(manifest["totals"])]
    for kind, samples in examples.items():
        component = manifest["config"]["kinds"].get(kind, {}).get("_component_", "")
        sections += [f"## {escape(kind)}", escape(str(component))]
        sections += [sample_table(*sample) for sample in samples]
    artifact.write_atomic(out, html(name, "\n\n".join(sections)))
    count = sum(map(len, examples.values()))
    made = {kind for kind, of in manifest["totals"]["kinds"].items() if of["made"]}
    none = ", ".join(sorted(made - examples.keys()))
    silent = f"; no audio was kept of {none}, whose examples were rejected" if none else ""
    print(f"{out}: {count} samples of {len(examples)} kinds{silent}")


if __name__ == "__main__":
    config.main(main, Listen, __doc__, ("path",))
