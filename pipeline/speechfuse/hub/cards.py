"""Data cards: the README.md of a dataset, a model or a quantizer on the Hub.

In: the folder of a finished artifact and the Markdown templates of data_cards/, whose slots are
`$name`. Out: the card's text, of which every figure comes from the manifest, the shards or
config.json. Equal artifacts give equal cards. A slot that stays unfilled is an error.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

import pyarrow.parquet as pq
import yaml
from safetensors import safe_open

from speechfuse import artifact
from speechfuse.hub import spoken_card
from speechfuse.rows import shards, statistics

# https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses any other in a card
LICENCES = frozenset(
    "apache-2.0 mit openrail bsd bsd-2-clause bsd-3-clause c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 etalab-2.0 agpl-3.0 gfdl gpl gpl-2.0 "
    "gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 mpl-2.0 odc-by odbl unlicense pddl llama2 llama3 llama3.1 "
    "llama3.2 llama3.3 gemma unknown".split()
)
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
COLUMNS = {
    "id": "name of the row, unique in the dataset",
    "codes": "the speech, as integers of the quantizer (list of uint16)",
    "seconds": "length of the audio",
    "text": "transcript, null where none is known",
    "speaker": "who speaks, as the source names them",
    "language": "language of the speech",
    "source": "where the audio lies in the source: `uri`, `offset`, `seconds`, `sha256`",
    "parent": "id of the recording that this row is a piece of, else null",
    "part": "number of the piece, from 0",
    "extra": "whatever else the source has, a JSON object",
    "turns": "the conversation: for each turn a `role` and `segments` of `text` or `speech`",
}
CHANGES = (  # key of the totals, what is said where it is not 0
    (
        "split",
        "{n} recordings were longer than the quantizer's window and were cut at the quietest "
        "places into {pieces} rows, tied together by `parent` and `part`. Pieces have no text: "
        "which words fall into which piece is not known.",
    ),
    ("resampled", "{n} recordings had another rate and were resampled to 16 kHz."),
    ("mixed_down", "{n} recordings had several channels and were mixed down to one."),
    ("without_text", "{n} recordings came without a transcript."),
    ("rejected", "{n} recordings could not be used and are not in the data: {kinds}."),
    ("filtered", "{n} recordings were left out by a filter: {kinds}."),
    ("ignored", "{n} files of the source were not looked at: {kinds}."),
)
SCRIPTS = {"finetune": "-m stages.train", "world": "recipes/demo/world.py"}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")


def kind_of(folder: Path) -> str:
    """ "dataset", "model" or "quantizer"; ValueError for a folder that is none of them."""
    if any(folder.glob("shard-*.parquet")):
        return "dataset"
    if any(folder.glob("*.safetensors")) and (folder / "config.json").exists():
        return "model" if "architectures" in _config(folder) else "quantizer"
    raise ValueError(
        f"{folder} is neither a dataset (shard-*.parquet) nor a model (config.json and "
        "*.safetensors); of a training run push one of its epochs, e.g. RUN/epoch_0"
    )


def licence_of(folder: Path, licence: str | None) -> str:
    """`licence`, or else the one that the corpus stated, or "unknown"."""
    stated = licence or _run(folder).get("totals", {}).get("licence") or "unknown"
    return stated.lower() if stated.lower() in LICENCES else stated


def card(folder: Path, templates: Path, repo: str, licence: str | None = None) -> str:
    """README.md of the artifact `folder`, for the repository `repo`. ValueError for a slot that
    nothing fills, an incomplete artifact, and what `kind_of` refuses."""
    kind, stated = kind_of(folder), licence_of(folder, licence)
    slots: dict[str, Any] = {"repo": repo, "title": repo.split("/")[-1], **_making(folder)}
    slots["licence"] = "not stated" if stated == "unknown" else stated
    slots |= {"dataset": _dataset, "model": _model, "quantizer": _quantizer}[kind](folder)
    metadata = {"pretty_name": slots["title"], **_licence(stated), **slots["metadata"]}
    slots["metadata"] = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    slots["made"] = _fill(templates / "made.md", slots)
    return _fill(templates / f"{kind}.md", slots)


def _fill(path: Path, slots: dict[str, Any]) -> str:
    template = Template(path.read_text("utf-8"))
    empty = [name for name in template.get_identifiers() if not str(slots.get(name) or "").strip()]
    if empty or not template.is_valid():
        raise ValueError(f"{path}: nothing fills the slots {', '.join(empty) or 'with a lone $'}")
    return template.substitute(slots).strip() + "\n"


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def _run(folder: Path) -> dict[str, Any]:
    """The manifest of the job that made the artifact; of an epoch, its run's."""
    manifest = artifact.manifest_of(folder)
    if "run" not in manifest:
        return manifest
    whole = folder.parent / "manifest.json"
    run = json.loads(whole.read_text("utf-8")) if whole.exists() else manifest["run"]
    return run if run["fingerprint"] == manifest["run"]["fingerprint"] else manifest["run"]


def _making(folder: Path) -> dict[str, str]:
    run = _run(folder)
    config = {k: v for k, v in run["config"].items() if k not in ("runtime", "fresh")}
    script = SCRIPTS.get(run["job"], f"-m stages.{run['job']}")
    version = run.get("libraries", {}).get("speechfuse", "(version not recorded)")
    return {
        "job": run["job"],
        "version": f"{version} (commit {run['git']})" if run.get("git") else version,
        "started": run["started"],
        "command": f"python {script} config.yaml",
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(),
        "inputs": _table((f"`{k}`", f"`{v}`") for k, v in run["inputs"].items()) or "| none | |",
        "fingerprint": artifact.fingerprint_of(folder),
    }


def _licence(stated: str) -> dict[str, str]:
    if stated in LICENCES:
        return {"license": stated}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+]+", "-", stated.lower())}


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _dataset(folder: Path) -> dict[str, Any]:
    paths, totals = shards.shard_paths(folder), _run(folder).get("totals", {})
    stream = shards.read_stream(folder)
    found = statistics.Statistics(stream)
    for path in paths:
        for batch in statistics.batches(path):
            found.add(batch)
    columns = pq.read_schema(paths[0]).names
    speech = "codes" in columns
    hours = found.seconds.sum / 3600
    what = "rows of speech" if speech else "conversations"
    size = next(i for i in range(len(SIZES)) if found.rows < 1000 * 10**i or i == len(SIZES) - 1)
    metadata = {
        "language": sorted({code for name in found.languages if (code := _language(name))}),
        "task_categories": ["automatic-speech-recognition"] if speech else ["text-generation"],
        "size_categories": [SIZES[size]],
        "tags": ["speechfuse", *(["speech-tokens"] if stream else [])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "shard-*.parquet"}],
            }
        ],
    }
    return {
        "metadata": {key: value for key, value in metadata.items() if value},
        "summary": f"{found.rows:,} {what}"
        + (f", {hours:,.2f} hours as {found.codes:,} codes of a speech quantizer" if stream else "")
        + ".",
        "columns": _table((f"`{name}`", COLUMNS[name]) for name in columns),
        "quantizer": _stream(stream),
        "statistics": _table(_statistics(found, totals)),
        "sources": f"Source: {totals['source']}."
        if totals.get("source")
        else "There are no recordings: the job below wrote the rows.",
        "changes": _changes(totals),
        "filters": _filters(_run(folder)["config"]),
    } | (_spoken(found, _run(folder)) if "kinds" in totals else {})


def _spoken(found: statistics.Statistics, run: dict[str, Any]) -> dict[str, str]:
    """Slots that a dataset of speech made from text fills in another way."""
    totals = run["totals"]
    return {
        "statistics": _table([*_statistics(found, totals), *spoken_card.statistics(totals)]),
        "sources": spoken_card.sources(totals),
        "changes": spoken_card.changes(totals),
        "filters": spoken_card.filters(run["config"]),
    }


def _language(name: str) -> str | None:
    """ "en" of en, en-us or en_GB: the Hub takes ISO 639 codes only."""
    match = re.match(r"([a-z]{2,3})(?![a-z])", name.lower())
    return match[1] if match else None


def _stream(stream: dict[str, Any]) -> str:
    if not stream:
        return "The rows hold no codes, so no quantizer had a part in them."
    return (
        f"Codes are whole numbers from 0 to {stream['codebook_size'] - 1}, "
        f"{stream['token_rate']:g} a second, of the quantizer with the identity "
        f"`{stream['quantizer']}` (a hash of its weights). They are not ids of any vocabulary: a "
        "language model gives each code an id of its own. Codes of two quantizers cannot be mixed."
    )


def _statistics(found: statistics.Statistics, totals: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "rows", f"{found.rows:,}"
    if found.utterances:
        yield "hours of speech", f"{found.seconds.sum / 3600:,.4f}"
        lengths = [found.seconds.mean, found.seconds.quantile(0.5), found.seconds.most]
        yield "seconds: mean, median, longest", ", ".join(f"{value:.1f}" for value in lengths)
        yield "with a transcript", f"{found.with_text / found.utterances:.1%}"
    if found.codes:
        yield "codes", f"{found.codes:,}"
        yield "codes a second", f"{found.rate:.2f}"
        yield "codes in use", f"{found.used:,} of {found.size:,}"
        yield "entropy of the codes", f"{found.entropy:.2f} bits"
    if "bits_per_code" in totals:
        yield "bits of file for each code", f"{totals['bits_per_code']}"
    if found.speakers:
        yield "speakers", f"{found.speakers:,}"
    if found.languages:
        yield "languages", ", ".join(f"{k} {n:,}" for k, n in found.languages.most_common())


def _changes(totals: dict[str, Any]) -> str:
    lines = []
    for key, words in CHANGES:
        if count := totals.get(key):
            kinds = count if isinstance(count, dict) else {}
            n = sum(kinds.values()) or count
            shown = ", ".join(f"{many:,} {kind}" for kind, many in sorted(kinds.items()))
            facts = {"n": f"{n:,}", "kinds": shown or "any reason", "pieces": totals.get("pieces")}
            lines.append(f"- {words.format(**facts)}")
    return "\n".join(lines) or "Nothing was left out, split or resampled."


def _filters(config: dict[str, Any]) -> str:
    specs = config.get("filters") or []
    lines = [
        f"- `{spec['_component_']}`: "
        + (", ".join(f"{k} {v}" for k, v in spec.items() if k != "_component_") or "as it comes")
        for spec in specs
    ]
    if config.get("drop_duplicate_audio"):
        lines.append("- of recordings with the same samples only the first is kept")
    return "\n".join(["Filters:", "", *lines]) if lines else "No filter was in use."


def _parameters(folder: Path) -> int:
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                total += size
    return total


def _model(folder: Path) -> dict[str, Any]:
    config, run, parameters = _config(folder), _run(folder), _parameters(folder)
    sound, manifest = config.get("speechfuse"), artifact.manifest_of(folder)
    names = {
        "architectures": "architecture",
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "num_attention_heads": "attention heads",
        "vocab_size": "vocabulary",
        "max_position_embeddings": "positions",
    }
    shape = [
        (names[k], ", ".join(v) if isinstance(v := config[k], list) else f"{v:,}")
        for k in names
        if k in config
    ]
    data = sorted({m[1] for value in run["inputs"].values() if (m := HUB_ID.fullmatch(value))})
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["speechfuse", *(["speech-tokens"] if sound else [])],
        "datasets": data,
    }
    return {
        "metadata": {key: value for key, value in metadata.items() if value},
        "summary": f"A language model of {parameters:,} parameters"
        + (" that hears speech as tokens of its vocabulary" if sound else "")
        + (f", epoch {manifest['epoch']} (from 0) of its training." if "run" in manifest else "."),
        "shape": _table([("parameters", f"{parameters:,}"), *shape]),
        "sound": "It has no sound tokens: it reads text alone."
        if not sound
        else f"Its sound tokens: `<|sound_start|>` is id {sound['start']}, `<|sound_end|>` id "
        f"{sound['end']}, codes 0 to {sound['codes'] - 1} are ids {sound['first']} to "
        f"{sound['first'] + sound['codes'] - 1}. The codes must come from the quantizer with the "
        f"identity `{sound['quantizer']}`.",
    }


def _quantizer(folder: Path) -> dict[str, Any]:
    totals, parameters = _run(folder).get("totals", {}), _parameters(folder)
    shape = [("parameters", f"{parameters:,}"), *_config(folder).items()]
    return {
        "metadata": {"tags": ["speechfuse", "speech-tokens"]},
        "summary": f"A speech quantizer of {parameters:,} parameters: it turns sound into codes.",
        "shape": _table(shape),
        "measured": _table(totals.items()) or "| nothing | |",
    }
