"""Listen to a spoken dataset: one HTML page with a few samples of every kind.

    python -m stages.listen path=out/data/instructions

In: a finished dataset of stages.synthesize_instructions. Out: a page that needs no other file, with
each sample's turns, its speech to be played, what was done to it, its codes, and checks. No audio
was kept: it is made again from what the rows and the manifest say, and encoded again, so that a
dataset whose speech is not what it says is seen at once. Nothing is written into its folder.

A dataset may come from anyone, and names the code that made it: only what runs nothing else and
asks nobody makes speech again here (espeak-ng, this pipeline's augmentation and sounds). For other
engines, and steps that read a folder, rows are shown without audio, unless trust=true.
"""

import base64
import html
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.audio import augmentation, decoding
from speechfuse.quantizer.model import Quantizer, QuantizerSpec
from speechfuse.rows import shards
from speechfuse.synthesis.recording import Piece, Studio, engines_of

JOB = "synthesize_instructions"
ENGINES = ("speechfuse.synthesis.Espeak",)
STEPS = tuple(
    f"speechfuse.audio.{name}"
    for name in ("Noise", "Reverberation", "Gain", "Speed", "Telephone", "Lossy")
)
SOUNDS = (
    "speechfuse.synthesis.silence",
    *(f"speechfuse.audio.{name}" for name in augmentation.NOISES),
)
NEARLY = 0.95  # of the codes are the same again: a batch's neighbours decide near-ties
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #ddd }
h2 small, .about { color: #666; font-weight: normal; font-size: .85rem }
article { margin: 1rem 0 2rem }
.turn { border-radius: .5rem; padding: .5rem .9rem; margin: .4rem 0; background: #f3f4f6 }
.assistant { background: #e8f1fb; margin-left: 3rem }
.speech { background: #fff; border: 1px solid #ddd; border-radius: .4rem; padding: .4rem .7rem;
  margin: .3rem 0 }
audio { width: 100%; height: 2.2rem } code { overflow-wrap: anywhere }
.ok { color: #18794e } .wrong { color: #b42318; font-weight: bold }
.turn span, .speech div:first-of-type { white-space: pre-wrap }
td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0 }
"""
SCRIPT = """
const all = [...document.querySelectorAll('audio')], said = document.getElementById('playable');
const count = () => said.textContent =
  `${all.filter(a => a.duration > 0).length} of ${all.length} recordings can be played here`;
all.forEach(a => ['loadedmetadata', 'error'].forEach(event => a.addEventListener(event, count)));
count();
"""


@dataclass
class Listen:
    path: str = field(metadata={"help": "folder of the dataset"})
    out: str | None = field(
        default=None, metadata={"help": "the page; null: NAME.listen.html beside the folder"}
    )
    rows: int = field(default=3, metadata={"help": "samples of each kind"})
    quantizer: str | None = field(
        default=None, metadata={"help": "where the quantizer is now; null: where it was"}
    )
    whisper: str | None = field(default=None, metadata={"help": "likewise, its Whisper"})
    trust: bool = field(
        default=False,
        metadata={"help": "run any code, program and server that the dataset names: your own only"},
    )


def rows_by_kind(paths: list[Path], many: int) -> dict[str, list[dict[str, Any]]]:
    """`many` rows of each kind, at equal distances, so that nobody chose them."""
    places: dict[str, list[tuple[Path, int]]] = {}
    for path in paths:
        for place, row in enumerate(shards.read_shard(path, ["extra"])):
            kind = json.loads(row["extra"]).get("kind", "")
            places.setdefault(kind, []).append((path, place))
    chosen = {
        kind: [found[i] for i in sorted({k * len(found) // many for k in range(many)})]
        for kind, found in sorted(places.items())
    }
    wanted = {place for found in chosen.values() for place in found}
    rows: dict[tuple[Path, int], dict[str, Any]] = {}
    for path in dict.fromkeys(path for path, _ in sorted(wanted)):
        mine = sorted(place for of, place in wanted if of == path)
        found_rows = shards.rows_of(pq.read_table(path).take(mine))
        rows |= {(path, place): row for place, row in zip(mine, found_rows, strict=True)}
    return {kind: [rows[place] for place in found] for kind, found in chosen.items()}


class Untrusted(Studio):
    """The studio of a dataset's configuration, which uses nothing but ENGINES, STEPS and SOUNDS."""

    def __init__(self, made: dict[str, Any], quantizer: Quantizer) -> None:
        engines, steps = made["voices"], made["augmentation"]
        fine = {n: spec for n, spec in engines.items() if spec.get("_component_") in ENGINES}
        bad = [s for s in steps if s.get("_component_") not in STEPS or s.get("folder")]
        self.refused = {n: engines[n].get("_component_") for n in engines.keys() - fine.keys()}
        self.step = bad[0].get("_component_") if bad else None
        super().__init__({}, engines_of(fine), [] if bad else steps, made["seed"], quantizer)

    def again(self, speech: dict[str, Any]) -> Piece:
        sound = json.loads(speech["extra"]).get("sound", SOUNDS[0])
        name = (speech["speaker"] or "").partition("/")[0]
        other = self.step or self.refused.get(name) or (sound if sound not in SOUNDS else None)
        if other:
            raise ValueError(
                f"not made again by {other}, which the dataset names: it could run or ask anything "
                "here; trust=true, if you made the dataset"
            )
        return super().again(speech)


def studio_of(made: dict[str, Any], quantizer: Quantizer, trust: bool) -> Studio:
    """The studio of the dataset's configuration; without engines, which is said, where they cannot
    be used here."""
    steps, seed = made["augmentation"], made["seed"]
    try:
        if not trust:
            return Untrusted(made, quantizer)
        rest = made["runtime"].get("voices", {})  # how an engine is reached
        voices = {name: {**spec, **rest.get(name, {})} for name, spec in made["voices"].items()}
        with (whole := Studio({}, engines_of(voices), steps, seed, quantizer)):
            return whole
    except (ValueError, OSError) as error:
        print(f"no audio: {error}")
        return Untrusted({**made, "voices": {}}, quantizer)


def player(waveform: np.ndarray) -> str:
    file = io.BytesIO()
    peak = max(1.0, float(np.abs(waveform).max(initial=0)))
    soundfile.write(file, waveform / peak, decoding.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="metadata" src="data:audio/flac;base64,{data}"></audio>'


def checks(speech: dict[str, Any], piece: Piece, quantizer: Quantizer) -> list[tuple[bool, str]]:
    """(whether it is right, what) of one piece of speech, made again."""
    extra, codes = json.loads(speech["extra"]), np.array(speech["codes"])
    found = [
        (
            abs(len(codes) - speech["seconds"] * quantizer.token_rate) <= 1.01,
            f"{len(codes)} codes for {speech['seconds']:.2f} s",
        )
    ]
    again = piece.codes if piece.waveform is None else quantizer.encode([piece.waveform])[0]
    assert again is not None
    if "shuffled" in extra:
        again = np.random.default_rng(extra["seed"]).permutation(again)
    same = float(np.mean(codes == again)) if len(codes) == len(again) else 0.0
    found.append((same >= NEARLY, f"{same:.0%} of the codes are the same when made again"))
    if extra.get("augmentation") != piece.about.get("augmentation"):
        found.append((False, "made again it is augmented in another way"))
    if "wer" in extra:
        found.append((True, f"heard: “{extra['heard']}”, {extra['wer']:.0%} of the words wrong"))
    return found


def described(speech: dict[str, Any]) -> str:
    """What a segment is, and what was done to it."""
    extra = json.loads(speech["extra"])
    said = [
        speech["speaker"] or f"{extra['sound']}, {extra['level'] or 'no'} dB",
        speech["language"],
    ]
    if speech["parent"]:
        said.append(f"piece {speech['part']} of a text spoken in several")
    known = ("augmentation", "heard", "wer", "sound", "level", "shuffled", "seconds")
    said += [f"{key} {value}" for key, value in extra.items() if key not in known]
    for step in extra.get("augmentation", []):
        values = ", ".join(f"{key} {value}" for key, value in step.items() if key != "name")
        said.append(f"{step['name']} ({values})")
    return " · ".join(str(each) for each in said if each)


def shown(speech: dict[str, Any], studio: Studio, quantizer: Quantizer) -> tuple[str, bool]:
    """HTML of one segment, and whether all its checks are right."""
    extra = json.loads(speech["extra"])
    text = html.escape(speech["text"] or "")
    if "shuffled" in extra:
        text = f"codes out of order; here as it was before: “{html.escape(extra['shuffled'])}”"
    try:
        piece = studio.again(speech)
        results = checks(speech, piece, quantizer)
        sound = "no audio: the engine makes codes from text"
        if piece.waveform is not None:
            sound = player(piece.waveform)
    except ValueError as error:
        results, sound = [], f'<span class="wrong">no audio: {html.escape(str(error))}</span>'
    marks = "; ".join(
        f'<span class="{name}">{mark} {html.escape(what)}</span>'
        for right, what in results
        for name, mark in [("ok", "✓") if right else ("wrong", "✗")]
    )
    codes = " ".join(map(str, speech["codes"]))
    return (
        f'<div class="speech">{sound}<div>{text}</div><div class="about">'
        f"{html.escape(described(speech))}<br>{marks}<details><summary>{len(speech['codes'])} codes"
        f"</summary><code>{codes}</code></details></div></div>",
        bool(results) and all(right for right, _ in results),
    )


def sample(row: dict[str, Any], studio: Studio, quantizer: Quantizer) -> tuple[str, int, int]:
    """HTML of one row; its pieces of speech, and those of them that are as they should be."""
    lines, pieces, right = [], 0, 0
    for turn in row["turns"]:
        role = html.escape(turn["role"])
        lines.append(f'<div class="turn {role}"><b>{role}</b> ')
        for segment in turn["segments"]:
            if segment["speech"] is None:
                lines.append(f"<span>{html.escape(segment['text'])}</span>")
                continue
            line, fine = shown(segment["speech"], studio, quantizer)
            lines.append(line)
            pieces, right = pieces + 1, right + fine
        lines.append("</div>")
    extra = {
        k: v for k, v in json.loads(row["extra"]).items() if k != "kind" and v not in (None, "")
    }
    about = " · ".join(f"{key} {value}" for key, value in extra.items())
    lines.append(f'<div class="about">{html.escape(row["id"])} · {html.escape(about)}</div>')
    return f"<article>{''.join(lines)}</article>", pieces, right


def figures(totals: dict[str, Any]) -> str:
    """The dataset in a table."""
    voices, heard = totals["voices"], totals["round_trip"]
    left_out = {**totals["rejected"], **totals["filtered"]}
    kinds = [f"{n} {of['made']:,} of {of['planned']:,}" for n, of in totals["kinds"].items()]
    lines = [
        ("samples", f"{totals['rows']:,} of {totals['samples']:,} planned"),
        ("kinds", "; ".join(kinds)),
        ("speech", f"{totals['hours']:.2f} h in {totals['pieces_of_speech']:,} pieces"),
        (
            "voices",
            f"{len(voices):,}, {min(voices.values(), default=0):,} to "
            f"{max(voices.values(), default=0):,} pieces each",
        ),
        ("sources", "; ".join(f"{name} {n:,}" for name, n in totals["sources"].items())),
        ("licence", totals["licence"]),
        ("left out", "; ".join(f"{n:,} {why}" for why, n in left_out.items()) or "nothing"),
        (
            "round trip, worst",
            "; ".join(
                f"{voice} {of['wer']:.1%} ({of['refused']} of {of['pieces']} left out)"
                for voice, of in list(heard.items())[:5]
            )
            or "not done",
        ),
    ]
    rows = (f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in lines)
    return f"<table>{''.join(rows)}</table>"


def main(job: Listen) -> None:
    folder = Path(job.path)
    if job.rows < 1:
        raise ValueError(f"rows={job.rows}: at least 1 is needed")
    manifest, paths = artifact.manifest_of(folder), shards.shard_paths(folder)
    if manifest["job"] != JOB:
        raise ValueError(f"{folder} was made by {manifest['job']}: only what {JOB} made is heard")
    name = folder.absolute().name
    place = Path(job.out) if job.out else folder.absolute().parent / f"{name}.listen.html"
    if place.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out={place} is inside the dataset {folder}: choose another place")
    made = manifest["config"]
    of = QuantizerSpec(**made["quantizer"])
    of.checkpoint, of.whisper = job.quantizer or of.checkpoint, job.whisper or of.whisper
    quantizer = of.load("cpu")
    if quantizer.identity != manifest["inputs"]["quantizer"]:
        raise ValueError(f"quantizer={of.checkpoint} is another one than made {folder}")
    chosen = rows_by_kind(paths, job.rows)
    sections, pieces, right = [], 0, 0
    studio = studio_of(made, quantizer, job.trust)
    bar = tqdm(total=sum(map(len, chosen.values())), desc="samples", unit="sample", delay=2)
    with bar, studio:
        for kind, rows in chosen.items():
            component = made["kinds"].get(kind, {}).get("_component_", "")
            heading = f"{html.escape(kind)} <small>{html.escape(str(component))}</small>"
            sections.append(f'<h2 id="{html.escape(kind)}">{heading}</h2>')
            for row in rows:
                text, many, fine = sample(row, studio, quantizer)
                sections.append(text)
                pieces, right = pieces + many, right + fine
                bar.update()
    links = " · ".join(f'<a href="#{html.escape(k)}">{html.escape(k)}</a>' for k in chosen)
    said = f"{right} of {pieces} pieces of speech are as their rows say"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(name)}</h1>{figures(manifest['totals'])}"
        f'<p class="{"ok" if right == pieces else "wrong"}">{said}</p><p id="playable"></p>'
        f"<nav>{links}</nav>{''.join(sections)}<script>{SCRIPT}</script></html>\n"
    )
    artifact.write_atomic(place, page)
    print(f"{place}: {sum(map(len, chosen.values()))} samples of {len(chosen)} kinds; {said}")


if __name__ == "__main__":
    config.main(main, Listen, __doc__, ("path",))
