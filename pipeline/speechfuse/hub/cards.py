"""Data cards: the README.md of a dataset, a model or a quantizer on the Hub.

In: the folder of a finished artifact and data_cards/, Jinja templates that hold every sentence of a
card. Out: the card's text, of which every figure comes from the manifest, the shards or
config.json. Equal artifacts give equal cards. A slot that nothing fills is an error.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
import yaml
from huggingface_hub import CardData, parse_local_safetensors_file_metadata

from speechfuse import artifact
from speechfuse.rows import shards, statistics
from speechfuse.tokens import weights
from speechfuse.tokens.vocabulary import read_config, read_speech
from speechfuse.tokens.weights import INDEX, SINGLE

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
SCRIPTS = {"finetune": "-m stages.train"} | {
    job: f"recipes/demo/{job}.py" for job in ("world", "dialogues", "init_base")
}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}")


def kind_of(folder: Path) -> str:
    """Return "dataset", "model" or "quantizer". Raises ValueError for any other folder."""
    if any(folder.glob("shard-*.parquet")):
        return "dataset"
    if any((folder / n).exists() for n in (SINGLE, INDEX)) and (folder / "config.json").exists():
        return "model" if "architectures" in read_config(folder) else "quantizer"
    raise ValueError(
        f"{folder} is neither a dataset (shard-*.parquet) nor a model (config.json and "
        f"{SINGLE}); of a training run push one of its epochs, e.g. RUN/epoch_0"
    )


def licence_of(folder: Path, licence: str | None) -> str:
    """Return `licence`, or else the one that the corpus stated, or "unknown"; several, of a list in
    YAML too, as "mit and cc-by-4.0"."""
    stated = licence or _run(folder).get("totals", {}).get("licence") or "unknown"
    names = [name.strip(" '\"") for name in re.split(" and |,", stated.strip("[] ").lower())]
    return " and ".join(names) if LICENCES.issuperset(names) else stated


def card(folder: Path, templates: Path, repo: str, licence: str | None = None) -> str:
    """Return README.md of the artifact `folder`, for the repository `repo`.

    Raises ValueError for a slot that nothing fills, an incomplete artifact, and what `kind_of`
    refuses.
    """
    kind, stated, run = kind_of(folder), licence_of(folder, licence), _run(folder)
    front, facts = _dataset(folder) if kind == "dataset" else _model(folder, run)
    title = repo.split("/")[-1]
    version = run.get("libraries", {}).get("speechfuse", "(version not recorded)")
    settings = {key: run["config"][key] for key in run["config"] if key not in ("runtime", "fresh")}
    # not DatasetCard.from_template: it leaves a slot that nothing fills empty, and knows no include
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["commas"] = "{:,}".format
    try:
        text = environment.get_template(f"{kind}.md").render(
            repo=repo,
            title=title,
            licence="not stated" if stated == "unknown" else stated,
            run=run,
            totals=run.get("totals", {}),
            version=f"{version} (commit {run['git']})" if run.get("git") else version,
            command=f"python {SCRIPTS.get(run['job'], '-m stages.' + run['job'])} config.yaml",
            recipe=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
            fingerprint=artifact.fingerprint_of(folder),
            **facts,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"{templates / kind}.md cannot be filled: {error}") from error
    metadata = CardData(pretty_name=title, **_licence(stated), **front).to_yaml()
    return f"---\n{metadata}\n---\n\n{text.strip()}\n"


def _run(folder: Path) -> dict[str, Any]:
    """Return the manifest of the job that made the artifact; of an epoch, its run's."""
    manifest = artifact.manifest_of(folder)
    if "run" not in manifest:
        return manifest
    whole = folder.parent / "manifest.json"
    run = json.loads(whole.read_text("utf-8")) if whole.exists() else manifest["run"]
    return run if run["fingerprint"] == manifest["run"]["fingerprint"] else manifest["run"]


def _licence(stated: str) -> dict[str, Any]:
    if LICENCES.issuperset(names := stated.split(" and ")):
        return {"license": names if len(names) > 1 else stated}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+]+", "-", stated.lower())}


def _dataset(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the front matter and what the template needs to know of a dataset."""
    paths, stream = shards.shard_paths(folder), shards.read_stream(folder)
    figures = statistics.Statistics(stream)
    for path in paths:
        for batch in statistics.batches(path):
            figures.add(batch)
    columns = pq.read_schema(paths[0]).names
    # the Hub takes ISO 639 codes only: "en" of en, en-us or en_GB
    codes = [re.match(r"[a-z]{2,3}(?![a-z])", name.lower()) for name in figures.languages]
    task = "automatic-speech-recognition" if "codes" in columns else "text-generation"
    files = [{"split": "train", "path": "shard-*.parquet"}]
    front = {
        "language": sorted({code[0] for code in codes if code}) or None,
        "task_categories": [task],
        "size_categories": [SIZES[min(len(str(figures.rows // 1000 or "")), len(SIZES) - 1)]],
        "tags": ["speechfuse", *(["speech-tokens"] if stream else [])],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    hours = figures.seconds.sum / 3600
    return front, {"columns": columns, "stream": stream, "figures": figures, "hours": hours}


def _model(folder: Path, run: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the front matter and what the template needs to know of a model or quantizer."""
    config, names = read_config(folder), {path.name for path in folder.glob("*.safetensors")}
    part = weights.speech_part(folder)
    alone = bool(part) and read_speech(folder).get("base", "") is not None
    if "architectures" in config:  # and no stray copies; a quantizer may have a decoder beside
        of_part = {name for name in part if name.endswith(".safetensors")}
        names = of_part if alone else of_part | {*weights.files(folder)}
    counts = [parse_local_safetensors_file_metadata(folder / n).parameter_count for n in names]
    facts = {
        "parameters": sum(sum(by_type.values()) for by_type in counts),
        "config": config,
        "sound": config.get("speechfuse"),
        "speech": read_speech(folder) if part else None,
        "alone": alone,
        "part": part,
        "epoch": artifact.manifest_of(folder).get("epoch"),
    }
    if "architectures" not in config:
        return {"tags": ["speechfuse", "speech-tokens"]}, facts
    datasets = {match[1] for value in run["inputs"].values() if (match := HUB_ID.fullmatch(value))}
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["speechfuse", *(["speech-tokens"] if facts["sound"] else [])],
        "datasets": sorted(datasets) or None,
    }
    return front, facts
