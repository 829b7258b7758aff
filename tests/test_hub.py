"""The Hub: pushing, loading with the stock clients, pinned commits, refusals. The clients talk to
tests/hub_server.py in processes of their own, by Xet (the default) and by LFS."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from speechfuse import artifact
from speechfuse.hub import cards, data
from speechfuse.rows import rejects, shards
from stages import push_to_hub
from tests.hub_server import HubServer
from tests.hub_xet import Refused

ROOT = Path(__file__).parent.parent
BASE, QUANTIZER = ROOT / "recipes/demo/models/base", ROOT / "recipes/demo/models/quantizer"
STREAM = {"quantizer": "ab" * 32, "token_rate": 25.0, "codebooks": 1, "codebook_size": 512}
TOTALS = {
    "clips": 1200,
    "split": 3,
    "pieces": 7,
    "resampled": 40,
    "mixed_down": 0,
    "without_text": 0,
    "rejected": {"not audio": 2, "empty": 1},
    "filtered": {"filter level": 5},
    "ignored": {},
    "source": "talks",
    "licence": "CC-BY-4.0",
    "bits_per_code": 8.9,
    "hours": 0.3,
}


def dataset(folder: Path, many: int = 3, seed: int = 0, totals: dict[str, Any] = TOTALS) -> Path:
    """A finished dataset of `many` shards of speech, with its rejects."""
    config = {
        "seed": seed,
        "corpus": {"_component_": "speechfuse.corpora.folder", "path": "talks"},
        "filters": [{"_component_": "speechfuse.audio.level", "min_dbfs": -45}],
    }
    work = artifact.Artifact(folder, "tokenize_speech", 2, config, {"corpus": "cd" * 32})
    work.begin([{"count": 400}] * many)
    paths = [folder / shards.shard_name(i) for i in range(many)]
    for i, path in enumerate(paths):
        rows = [
            {
                "id": f"{i}/{row}",
                "codes": [(seed + i * row + k * k) % 512 for k in range(25)],
                "seconds": 1.0,
                "text": f"row {row} of {i}",
                "language": "en-us",
                "speaker": "ann",
                "source": {"uri": f"{i}.wav"},
                "extra": "{}",
            }
            for row in range(400)
        ]
        shards.write_shard(path, rows, shards.SPEECH, STREAM)
        rejects.write_rejects(path, [{"id": "x", "reason": "empty: no samples"}] if i == 0 else [])
    work.finish(totals, [*paths, *(path.with_suffix(".rejects.jsonl") for path in paths)])
    return folder


def conversations(folder: Path, words: str) -> Path:
    """A finished dataset of text for the demo's base model."""
    rows = [
        {
            "id": word,
            "turns": [
                {"role": "user", "segments": [{"text": f"repeat: {word}"}]},
                {"role": "assistant", "segments": [{"text": word}]},
            ],
            "extra": "{}",
        }
        for word in words.split()
    ]
    work = artifact.Artifact(folder, "test", 1, {"words": words}, {})
    work.begin()
    shards.write_shard(folder / shards.shard_name(0), rows, shards.CONVERSATIONS)
    work.finish({}, [folder / shards.shard_name(0)])
    return folder


@pytest.fixture
def hub():
    with HubServer({"good": "me", "other": "you"}) as server:
        yield server


def environment(hub: HubServer, home: Path, xet: bool = True, token: str = "good") -> dict:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": f"{ROOT}/pipeline:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
    }


def pushing(folder: Path, repo: str, *more: str) -> list[str]:
    job = [sys.executable, "-m", "stages.push_to_hub"]
    return [*job, f"path={folder}", f"repo={repo}", *more]


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def run(command: list[str], env: dict) -> str:
    """What a process prints; it must succeed."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def holds(hub: HubServer, repo: str, folder: Path) -> bool:
    """Whether the newest commit has every output of an artifact, byte for byte."""
    files = hub.dataset(repo).at("main")[1].files
    outputs = artifact.manifest_of(folder)["outputs"]
    return all(hashlib.sha256(files[n].data).hexdigest() == outputs[n] for n in outputs)


def rows_hash(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


STOCK = """
import hashlib, json, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

def digest(rows):
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()

base, found = sys.argv[1], {}
for repo, revision in zip(sys.argv[2::2], sys.argv[3::2]):
    found[repo] = digest(load_dataset(repo, split="train", revision=revision))
found["streamed"] = digest(load_dataset(repo, split="train", streaming=True))
ids = AutoTokenizer.from_pretrained("me/base")("where does a bee live", return_tensors="pt")
for place in ("me/base", base):
    found[place] = AutoModelForCausalLM.from_pretrained(place)(**ids).logits.double().sum().item()
print(json.dumps(found))
"""


def test_stock_clients_load_what_was_pushed(hub, tmp_path):
    """Datasets whole, at a commit and streamed; a model with its tokenizer. Sent by Xet and LFS."""
    revisions, wanted = {}, {}
    for repo, xet in (("me/xet", True), ("me/lfs", False)):
        folder = dataset(tmp_path / repo / "talks", seed=int(xet))
        before = sorted(path.name for path in folder.iterdir())
        said = run(pushing(folder, repo), environment(hub, tmp_path, xet))
        commits = hub.dataset(repo).commits
        assert [commit.title for commit in commits.values()] == ["initial commit", "Push talks"]
        revisions[repo] = hub.dataset(repo).branches["main"]
        assert f"{repo}@{revisions[repo]}" in said and hub.dataset(repo).private
        record = json.loads((tmp_path / repo / "pushed-talks.json").read_text())
        assert record["revision"] == revisions[repo] and record["repo"] == repo
        manifest = artifact.manifest_of(folder)
        sent = {*manifest["outputs"], "manifest.json", "README.md", ".gitattributes"}
        assert set(commits[revisions[repo]].files) == sent
        assert sorted(path.name for path in folder.iterdir()) == before
        rows = [{**row, "codes": row["codes"].tolist()} for row in shards.read_rows(folder)]
        wanted[repo] = rows_hash(rows)
    assert hub.requests("PUT /storage/") and hub.requests("POST /cas/v1/xorbs/")
    model = shutil.copytree(BASE, tmp_path / "model")
    run(pushing(model, "me/base"), environment(hub, tmp_path))
    env = environment(hub, tmp_path / "client")
    said = run(python(STOCK, BASE, *sum(revisions.items(), ())), env)
    found = json.loads(said.splitlines()[-1])
    assert {repo: found[repo] for repo in wanted} == wanted
    assert found["streamed"] == wanted["me/lfs"]
    assert hub.requests("GET /cas/v1/reconstructions/") and hub.requests("GET /cdn/object/")
    assert found["me/base"] == pytest.approx(found[str(BASE)], rel=1e-6)


class Stop:
    """Kills the process that sends the n-th request which fits `pattern`, unanswered."""

    def __init__(self, hub: HubServer, pattern: str, count: int) -> None:
        self.pattern, self.left, self.reached = pattern, count, threading.Event()
        self.gone, self.lock = threading.Event(), threading.Lock()
        hub.before = self

    def __call__(self, method: str, path: str) -> None:
        if re.search(self.pattern, f"{method} {path}"):
            with self.lock:
                self.left -= 1
                if self.left > 0:
                    return
            self.reached.set()
            self.gone.wait(60)
            raise Refused(500, "", "it was killed")

    def kill(self, command: list[str], env: dict) -> None:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
        assert self.reached.wait(60)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        self.gone.set()


@pytest.mark.parametrize(
    ("xet", "upload"), [(True, "POST /cas/v1/xorbs/"), (False, "PUT /storage/")]
)
def test_a_push_that_is_killed_twice_ends_whole(hub, tmp_path, xet, upload):
    folder = dataset(tmp_path / "talks", many=5)
    env, command = environment(hub, tmp_path, xet), pushing(folder, "me/talks")
    Stop(hub, upload, 1 if xet else 4).kill(command, env)
    assert [c.title for c in hub.dataset("me/talks").commits.values()] == ["initial commit"]
    Stop(hub, r"POST /api/.*/commit/", 1).kill(command, env)
    assert list(hub.dataset("me/talks").at("main")[1].files) == [".gitattributes"]
    hub.before = lambda method, path: None
    run(command, env)
    titles = [commit.title for commit in hub.dataset("me/talks").commits.values()]
    assert titles == ["initial commit", "Push talks"]
    assert holds(hub, "me/talks", folder)
    if not xet:  # what the first two had sent whole was not sent again
        sent = hub.requests(upload)
        assert len(set(sent)) == 5 and max(map(sent.count, sent)) <= 2 and len(sent) <= 7
    assert not (tmp_path / "talks/pushed.json").exists()


JOB = """
import contextlib, io, json, os, sys
from stages.push_to_hub import PushToHub, main

def tried(token, **keys):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            main(PushToHub(**keys))
        except ValueError as error:
            return f"refused: {error}"
    return said.getvalue()

print(json.dumps([tried(**step) for step in json.loads(sys.argv[1])]))
"""


def pushes(hub: HubServer, tmp_path: Path, *steps: dict[str, Any]) -> list[str]:
    """What each of several pushes says, all in one process."""
    return json.loads(run(python(JOB, json.dumps(steps)), environment(hub, tmp_path)))


def test_only_differences_make_a_commit(hub, tmp_path):
    first, second = dataset(tmp_path / "a/talks"), dataset(tmp_path / "b/talks", many=2, seed=1)
    step = {"token": "good"}  # without a repo: the account of the token and the folder's name
    *_, again = pushes(
        hub, tmp_path, *[step | {"path": str(first)}] * 2, *[step | {"path": str(second)}] * 2
    )
    repo = hub.dataset("me/talks")
    assert "has exactly this, nothing to do" in again and repo.branches["main"] in again
    assert [commit.title for commit in repo.commits.values()][1:] == ["Push talks"] * 2
    names = repo.at("main")[1].files
    assert holds(hub, "me/talks", second)
    assert "shard-00001.parquet" in names and "shard-00002.parquet" not in names
    repo.commit("main", "by hand", {**names, "NOTES.md": names["README.md"]})
    (last,) = pushes(hub, tmp_path, step | {"path": str(first)})
    assert "NOTES.md" in repo.at("main")[1].files and "nothing to do" not in last
    assert holds(hub, "me/talks", first)
    assert len(repo.commits) == 5


def test_refusals_are_one_sentence_and_send_nothing(hub, tmp_path):
    good = dataset(tmp_path / "good")
    broken = {}
    for name in ("changed", "lost", "escape", "link", "incomplete"):
        broken[name] = tmp_path / name
        shutil.copytree(good, broken[name])
    shard = broken["changed"] / "shard-00001.parquet"
    shutil.copy(good / "shard-00000.parquet", shard)
    (broken["lost"] / "shard-00001.rejects.jsonl").unlink()
    manifest = json.loads((broken["escape"] / "manifest.json").read_text())
    manifest["outputs"]["../secret.txt"] = hashlib.sha256(b"x").hexdigest()
    artifact.write_json(broken["escape"] / "manifest.json", manifest)
    (tmp_path / "secret.txt").write_text("x")
    outside = tmp_path / "elsewhere.parquet"
    shutil.move(broken["link"] / "shard-00002.parquet", outside)
    (broken["link"] / "shard-00002.parquet").symlink_to(outside)
    (broken["incomplete"] / "manifest.json").unlink()
    run(pushing(good, "me/private"), environment(hub, tmp_path))
    step = {"token": "good", "repo": "me/new", "path": str(good)}
    unstated = dataset(tmp_path / "unstated", totals=TOTALS | {"licence": None})
    partly = dataset(tmp_path / "partly", totals=TOTALS | {"licence": "mit and unknown"})
    unsent = dataset(tmp_path / "unsent", seed=7)
    cases = [
        ({"token": None}, "HF_TOKEN is not set"),
        ({"token": "stolen"}, "HF_TOKEN is not a valid token"),
        ({"token": "other", "repo": "me/private"}, "HF_TOKEN has no right"),
        ({"token": "other"}, "HF_TOKEN has no right"),
        ({"private": False, "repo": "me/private"}, "me/private is there and private"),
        ({"path": str(broken["changed"])}, "shard-00001.parquet has another sha256"),
        ({"path": str(broken["lost"])}, "shard-00001.rejects.jsonl of its manifest is not there"),
        ({"path": str(broken["escape"])}, "../secret.txt of its manifest leads out"),
        ({"path": str(broken["link"])}, "shard-00002.parquet of its manifest leads out"),
        ({"path": str(broken["incomplete"])}, "is incomplete (no manifest.json)"),
        ({"path": str(tmp_path)}, "is neither a dataset"),
        ({"path": "no-such-folder"}, "there is no such folder"),
        ({"path": str(unstated), "private": False}, "its licence, or that of a part"),
        ({"path": str(partly), "private": False}, "its licence, or that of a part of it, is not"),
        ({"path": str(unsent), "repo": "me/empty"}, "the transfer stopped"),
        ({"repo": "me/raced"}, "somebody else has committed"),
    ]
    before = set(hub.repos)

    def meddle(method: str, path: str) -> None:
        if path.startswith("/cas/v1/xorbs/"):
            raise Refused(403, "", "the storage is full")
        if path.endswith("me/raced/commit/main"):
            hub.dataset("me/raced").commit("main", "by hand", {})

    hub.before = meddle
    said = pushes(hub, tmp_path, *[step | change for change, _ in cases])
    for text, (change, wanted) in zip(said, cases, strict=True):
        assert text.startswith("refused: ") and wanted in text, (change, text)
        assert "\n" not in text and "stolen" not in text
    assert set(hub.repos) - before == {("dataset", "me/empty"), ("dataset", "me/raced")}
    assert len(hub.dataset("me/empty").commits) == 1
    assert hub.dataset("me/raced").at("main")[1].files == {}
    here = len(hub.log)
    (dry,) = pushes(hub, tmp_path, step | {"token": None, "dry_run": True, "licence": "MIT"})
    assert len(hub.log) == here and "license: mit" in dry
    size = (good / "shard-00002.parquet").stat().st_size
    assert re.search(rf"{size:,}  shard-00002.parquet\n", dry)
    assert "would go to me/new (dataset, private); nothing was sent" in dry


READING = """
import json, os, sys
import pyarrow.parquet as pq
from pathlib import Path
from speechfuse.hub import data as hub
from speechfuse.rows import shards

out, commit = Path(sys.argv[1]), sys.argv[2]
found = {"folder": hub.pinned(str(out)), "fresh": hub.pinned("me/talks@main")}
found["pinned"] = hub.pinned("me/talks@main", out)
found["rows"] = sum(1 for _ in shards.read_rows(hub.local(f"me/talks@{commit}"), ["id"]))
filesystem = hub.filesystem()
root = f"datasets/me/talks@{commit}"
with filesystem.open(f"{root}/shard-00000.parquet") as file, pq.ParquetFile(file) as table:
    found["range"] = table.read(["seconds"]).num_rows
found["refused"] = []
for path in ("me/talks@branch", "me/none@main"):
    try:
        hub.local(path)
    except ValueError as error:
        found["refused"].append(str(error))
os.environ["HF_TOKEN"] = ""
for path in ("me/talks@main", "me/talks@" + "0" * 40):
    try:
        hub.local(path)
    except ValueError as error:
        found["refused"].append(str(error))
print(json.dumps(found))
sys.stdout.flush()
"""


def test_a_branch_is_read_at_the_commit_that_a_job_began_with(hub, tmp_path):
    folder, env = dataset(tmp_path / "talks", many=2), environment(hub, tmp_path)
    run(pushing(folder, "me/talks"), env)
    repo = hub.dataset("me/talks")
    old = repo.branches["main"]
    work = artifact.Artifact(tmp_path / "out", "job", 1, {}, {"me/talks@main": f"me/talks@{old}"})
    work.begin()
    later = repo.at("main")[1].files
    new = repo.commit("main", "by hand", {k: v for k, v in later.items() if k != "manifest.json"})
    (tmp_path / "hf/token").write_text("good")  # as `hf auth login` leaves it: not to be used
    said = run(python(READING, tmp_path / "out", old), env).splitlines()
    found = json.loads(said[-1])
    assert found["folder"] is None and found["fresh"] == f"me/talks@{new}"
    assert found["pinned"] == f"me/talks@{old}"
    assert len(said) == 2 and f"me/talks@{old}" in said[0] and f"me/talks@{new}" in said[0]
    assert said[0].startswith("me/talks@main has moved:")
    assert found["rows"] == 800 and found["range"] == 400
    for text, wanted in zip(
        found["refused"],
        ("no such branch", "no such repository", "HF_TOKEN is not set", "HF_TOKEN is not set"),
        strict=True,
    ):
        assert wanted in text and "\n" not in text


TRAINING = """
import shutil, sys
from pathlib import Path
from speechfuse import config
from speechfuse.hub import push
from speechfuse.train import loop
from speechfuse.train.config import Finetune

run, later = Path(sys.argv[1]), Path(sys.argv[2])
job = config.load(Finetune, run.with_suffix(".yaml"), [])
loop.run(job)
shutil.copytree(run, run.with_name("first"))
(run / "manifest.json").unlink()  # as if it had been stopped in its second epoch
shutil.rmtree(run / "epoch_1")
push.push(later, "me/words", "later", "dataset")
loop.run(job)
"""


def test_training_reads_a_branch_and_stays_with_its_commit(hub, tmp_path):
    env = environment(hub, tmp_path)
    words = conversations(tmp_path / "words", "cat dog bee cow hen owl fox ant bat elk")
    run(pushing(words, "me/words"), env)
    repo = hub.dataset("me/words")
    old = repo.branches["main"]
    shape = json.loads((BASE / "config.json").read_text())
    recipe = {
        "out": str(tmp_path / "run"),
        "checkpoint": str(BASE),
        "seq_len": 32,
        "batch_size": 2,
        "model": {
            "_component_": "torchtune.models.llama3_1.llama3_1",
            "vocab_size": shape["vocab_size"],
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 4,
            "embed_dim": 160,
            "intermediate_dim": 448,
            "max_seq_len": 64,
        },
        "datasets": [
            {
                "_component_": "speechfuse.samples.conversations",
                "path": "me/words@main",
                "share": 1,
            }
        ],
        "epochs": 2,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "warmup_steps": 1,
        "runtime": {"threads": 1, "state_every": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    later = conversations(tmp_path / "later", "yak emu")
    said = run(python(TRAINING, tmp_path / "run", later), env)
    new = repo.branches["main"]
    first, again = (artifact.manifest_of(tmp_path / name) for name in ("first", "run"))
    assert first["inputs"]["me/words@main"] == f"me/words@{old}" and new != old
    assert said.count("has moved") == 1
    assert f"begun with me/words@{old} and stays with it; now it is me/words@{new}" in said
    assert again["inputs"] == first["inputs"]
    assert again["totals"]["samples"] == first["totals"]["samples"] == [20]
    epoch = cards.card(tmp_path / "run/epoch_1", ROOT / "data_cards", "me/model", "llama3.1")
    metadata = yaml.safe_load(epoch.split("---")[1])
    assert metadata["datasets"] == ["me/words"] and metadata["license"] == "llama3.1"
    assert old in epoch


def test_a_card_says_what_the_manifest_does(tmp_path):
    folder = dataset(tmp_path / "talks")
    card = cards.card(folder, ROOT / "data_cards", "me/talks")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {
        "pretty_name": "talks",
        "license": "cc-by-4.0",
        "language": ["en"],
        "task_categories": ["automatic-speech-recognition"],
        "size_categories": ["1K<n<10K"],
        "tags": ["speechfuse", "speech-tokens"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "shard-*.parquet"}],
            }
        ],
    }
    for said in (
        "1,200 rows of speech, 0.33 hours as 30,000 codes",
        "Codes are whole numbers from 0 to 511",
        "25 a second",
        STREAM["quantizer"],
        "3 recordings were longer",
        "into 7 rows",
        "40 recordings had another rate",
        "not in the data: 1 empty, 2 not audio",
        "left out by a filter: 5 filter level",
        "`speechfuse.audio.level`: min_dbfs -45",
        "Source: talks.",
        "Licence: cc-by-4.0",
        "| speakers | 1 |",
        "| `codes` |",
        'load_dataset("me/talks"',
        "python -m stages.tokenize_speech config.yaml",
        "path: talks",
        artifact.fingerprint_of(folder),
    ):
        assert said in card, said
    assert "mixed down" not in card and str(tmp_path) not in card and "{" not in card
    own = cards.card(folder, ROOT / "data_cards", "me/talks", "Talks Licence 2")
    metadata = yaml.safe_load(own.split("---")[1])
    assert (metadata["license"], metadata["license_name"]) == ("other", "talks-licence-2")


def test_the_card_of_spoken_text_says_what_was_dropped_and_who_is_hard_to_understand(tmp_path):
    trip = {"listener": {"_component_": "speechfuse.synthesis.QuantizerDecoder"}}
    work = artifact.Artifact(
        tmp_path / "spoken",
        "synthesize_instructions",
        1,
        {"augmentation": [], "round_trip": trip},
        {},
    )
    work.begin()
    path = tmp_path / "spoken" / shards.shard_name(0)
    turn = {"role": "user", "segments": [{"text": "say yes"}]}
    shards.write_shard(path, [{"id": "a", "turns": [turn], "extra": "{}"}], shards.CONVERSATIONS)
    step = {
        "step": "length",
        "dropped": {"short": 1200, "long": 3},
        "rewritten": {"x": 2},
        "kept": 4,
    }
    totals = {
        "kinds": {"turns": {"planned": 9, "made": 1}},
        "voices": {"ann": 3, "bob": 1005},
        "round_trip": {
            "ann": {"pieces": 3, "refused": 0, "wer": 0.05},
            "bob": {"pieces": 4, "refused": 1, "wer": 0.25},
        },
        "sources": {"talks": 1},
        "licences": {"talks": None},
        "split": 0,
        "pieces": 0,
        "rejected": {"too long": 8},
        "filtered": {},
        "curation": {"texts": [step]},
    }
    work.finish(totals, [path])
    card = cards.card(tmp_path / "spoken", ROOT / "data_cards", "me/spoken")
    for line in (
        "1 conversations.",
        "The rows hold no codes, so no quantizer had a part in them.",
        "| samples of the kind `turns` | 1 of 9 planned |",
        "| voices | 2, each in 3 to 1,005 pieces of speech |",
        "| pieces by voice | ann 3, bob 1,005 |",
        "| word errors of a listener, by voice, the worst first | bob 25.0% (1 of 4 left out), ann "
        "5.0% (0 of 3 left out) |",
        "- talks: 1 samples, licence not stated",
        "- 8 samples could not be spoken: 8 too long.",
        "- length: dropped 3 long, 1,200 short; rewrote 2 x; 4 rows left",
        "Left out is what a listener (`speechfuse.synthesis.QuantizerDecoder`) gets more than 30% "
        "wrong of.",
    ):
        assert line in card.splitlines(), line
    assert "Augmentation" not in card and "texts were too long" not in card


def test_a_name_is_looked_for_where_artifacts_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/data/talks").mkdir(parents=True)
    (tmp_path / "out/models/tiny").mkdir(parents=True)
    assert push_to_hub.folder_of("talks") == Path("out/data/talks")
    assert push_to_hub.folder_of("tiny") == Path("out/models/tiny")
    assert push_to_hub.folder_of("out/data/talks") == Path("out/data/talks")


def test_a_slot_that_nothing_fills_is_an_error(tmp_path):
    folder = dataset(tmp_path / "talks", many=1)
    templates = shutil.copytree(ROOT / "data_cards", tmp_path / "cards")
    with (templates / "dataset.md").open("a") as file:
        file.write("\nAnnotators: {{ annotators }}\n")
    with pytest.raises(ValueError, match=r"dataset\.md cannot be filled: 'annotators' is undef"):
        cards.card(folder, templates, "me/talks")


@pytest.mark.parametrize(("folder", "words"), [(BASE, "architecture"), (QUANTIZER, "n_audio_ctx")])
def test_models_and_quantizers_have_cards(folder, words):
    card = cards.card(folder, ROOT / "data_cards", "me/it")
    assert f"| {words} |" in card and "parameters" in card and "license: unknown" in card
    assert cards.kind_of(folder) in ("model", "quantizer")


@pytest.mark.parametrize(
    ("front", "stated", "metadata"),
    [
        ("license: mit", "mit", {"license": "mit"}),
        ("license: [mit, cc-by-4.0]", "mit and cc-by-4.0", {"license": ["mit", "cc-by-4.0"]}),
        (
            "license: other\nlicense_name: mine",
            "mine",
            {"license": "other", "license_name": "mine"},
        ),
        ("license: no\ntitle: a --- b", None, None),
        ("license: [no, mit, mit]", "unknown and mit", {"license": ["unknown", "mit"]}),
        ("license: []", None, None),
        ("title: x", None, None),
    ],
)
def test_a_card_may_state_several_licences(front, stated, metadata):
    for mark in "", "\ufeff":
        assert data.licence_on(f"{mark}---\n{front}\n---\n# A set\n") == stated
    assert metadata is None or cards._licence(stated) == metadata


@pytest.mark.parametrize("text", ["[mit, cc-by-4.0]", "['MIT',CC-BY-4.0]", "mit,cc-by-4.0"])
def test_several_licences_may_be_given_to_a_push(tmp_path, text):
    (tmp_path / "manifest.json").write_text("{}")
    assert cards.licence_of(tmp_path, text) == "mit and cc-by-4.0"
    assert cards.licence_of(tmp_path, "mine, and others'") == "mine, and others'"
