"""A dataset of the Hub as a corpus: from a server that speaks the Hub's protocol, stock client."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from speechfuse.corpora.clip import Clip
from speechfuse.corpora.parquet import Parquet
from tests.hub_server import File, HubServer, Repo

ROOT = Path(__file__).parent.parent
READ = """
import hashlib, json, sys
from speechfuse.corpora.hub_dataset import Hub
from speechfuse.rows.rejects import Reject

def shown(item):
    if isinstance(item, Reject):
        return [item.id, item.reason]
    digest = hashlib.sha256(item.audio).hexdigest()
    return [item.id, digest, item.uri, item.text, item.speaker, item.language, item.extra]

def tried(arguments):
    corpus = Hub(**arguments)
    try:
        plan = corpus.plan(4)
        return corpus.fingerprint, plan, [shown(c) for shard in plan for c in corpus.clips(shard)]
    except (FileNotFoundError, ValueError) as error:
        return str(error)

for line in sys.stdin:
    arguments = json.loads(line)
    if shard := arguments.pop("shard", None):
        print(json.dumps([shown(clip) for clip in Hub(**arguments).clips(shard)]), flush=True)
    else:
        print(json.dumps(tried(arguments)), flush=True)
"""


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, 1600)
    soundfile.write(file, samples, 16_000, format="WAV")
    return file.getvalue()


def row(i: int, **changes) -> dict:
    audio = {"bytes": encoded(i), "path": f"{i}.wav"}
    return {"audio": audio, "text": f"text {i}", "id": f"u{i}", "who": i % 2, **changes}


class Reader:
    """A process that reads corpora from the server; one, because its imports take the time."""

    def __init__(self, url: str, home: Path) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {
            **kept,
            "HF_ENDPOINT": url,
            "HF_TOKEN": "good",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
            "PYTHONPATH": f"{ROOT}/pipeline:{ROOT}",
            "OMP_NUM_THREADS": "1",
        }
        self.place = {"cwd": ROOT, "env": environment, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ],
            **self.place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, **arguments):
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"repo": "me/speech", **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(server, its repository me/speech, what commits a folder there, what reads from it)."""
    with HubServer({"good": "me"}) as server:
        repo = server.repos["dataset", "me/speech"] = Repo(private=True)

        def commit(folder: Path) -> str:
            files = {}
            for path in folder.rglob("*"):
                if path.is_file():
                    name = path.relative_to(folder).as_posix()
                    files[name] = File.of(path.read_bytes(), lfs=path.suffix == ".parquet")
                    if files[name].sha256:
                        server.objects[files[name].sha256] = files[name].data
            return repo.commit("main", "by hand", files)

        reader = Reader(server.url, tmp_path_factory.mktemp("home"))
        yield server, commit, reader
        assert reader.process.stdin
        reader.process.stdin.close()
        reader.process.wait(20)


def written(folder: Path, name: str, content: list[dict], **how) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(content), path, **how)


def test_a_dataset_of_the_hub_is_read_as_the_same_files_on_disk(hub, tmp_path):
    _, commit, read = hub
    written(tmp_path, "german/train-00000.parquet", [row(i) for i in range(6)], row_group_size=3)
    written(tmp_path, "german/train-00001.parquet", [row(i) for i in range(6, 9)])
    written(tmp_path, "german/test-00000.parquet", [row(99)])
    (tmp_path / "README.md").write_text("a card")
    sha = commit(tmp_path)
    columns = {"text_column": "text", "id_column": "id", "speaker_column": "who", "language": "de"}
    found = read(revision="main", data_files="german/train-*.parquet", **columns)
    fingerprint, plan, clips = found
    assert fingerprint == f"me/speech@{sha}"
    assert [(s["file"], s["row"], s["count"], s["revision"]) for s in plan] == [
        ("german/train-00000.parquet", 0, 3, sha),
        ("german/train-00000.parquet", 3, 3, sha),
        ("german/train-00001.parquet", 0, 3, sha),
    ]
    local = Parquet(str(tmp_path / "german/train-*.parquet"), **columns)
    here = [clip for shard in local.plan(100) for clip in local.clips(shard)]
    assert len(here) == 9
    for (id, digest, uri, *said), clip in zip(clips, here, strict=True):
        assert isinstance(clip, Clip) and isinstance(clip.audio, bytes)
        assert (id, digest) == (clip.id, hashlib.sha256(clip.audio).hexdigest())
        assert uri == f"hf://datasets/me/speech@{sha}/german/{clip.uri}"
        assert said == [clip.text, clip.speaker, clip.language, clip.extra]
    assert read(revision=sha, data_files=["german/train-*"], **columns) == found

    written(tmp_path, "german/train-00000.parquet", [row(50)])
    moved = commit(tmp_path)
    old = {"revision": "main", "data_files": "german/*", **columns}
    assert read(shard=plan[0], **old) == clips[:3]  # planned work stays with its commit
    assert read(**old)[0] == f"me/speech@{moved}"


TOKENIZE = """
import json, sys
from pathlib import Path
from speechfuse import config
from speechfuse.rows import making
from stages import tokenize_speech

job = config.load(tokenize_speech.TokenizeSpeech, Path(sys.argv[1]), [])
if sys.argv[2] == "stop":
    making.make = lambda *_: exit("stopped")
tokenize_speech.main(job)
"""


def test_tokenizing_stays_with_the_commit_that_it_was_begun_with(hub, tmp_path):
    _, commit, read = hub
    written(tmp_path, "a.parquet", [row(i) for i in range(3)])
    first = commit(tmp_path)
    recipe = {
        "out": str(tmp_path / "out"),
        "corpus": {
            "_component_": "speechfuse.corpora.hub",
            "repo": "me/speech",
            "revision": "main",
            "data_files": "a.parquet",
            "id_column": "id",
        },
        "quantizer": {"checkpoint": str(ROOT / "recipes/demo/models/quantizer")},
        "runtime": {"workers": 1, "device": "cpu"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-c", TOKENIZE, str(tmp_path / "job.yaml")]

    def run(how: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, how], **read.place, capture_output=True)

    assert "stopped" in run("stop").stderr
    written(tmp_path, "a.parquet", [row(i) for i in range(5)])
    now = commit(tmp_path)
    done = run("on")
    assert done.returncode == 0, done.stderr
    assert f"begun with me/speech@{first}" in done.stdout and f"me/speech@{now}" in done.stdout
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["inputs"]["corpus"] == f"me/speech@{first}" and manifest["totals"]["rows"] == 3


def test_only_the_ranges_that_are_used_are_fetched(hub, tmp_path):
    server, commit, read = hub
    noise = np.random.default_rng(0)
    content = [row(i, ballast=noise.bytes(500_000)) for i in range(80)]
    written(tmp_path, "a.parquet", content, row_group_size=4, compression="none")
    size = (tmp_path / "a.parquet").stat().st_size
    commit(tmp_path)
    asked = {"revision": "main", "data_files": "a.parquet"}
    plan = read(**asked)[1]
    assert len(plan) == 20 and size > 40e6
    server.fetched = 0
    assert len(read(shard=plan[7], **asked)) == 4
    assert 0 < server.fetched < size / 4


def test_what_is_wrong_with_a_dataset_of_the_hub(hub, tmp_path):
    _, commit, read = hub
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/x.wav").write_bytes(encoded(7))
    paths = ["clips/x.wav", "clips/no.wav", "../clips/x.wav", "/etc/passwd"]
    content = [row(i, audio={"bytes": None, "path": path}) for i, path in enumerate(paths)]
    written(tmp_path, "paths.parquet", [*content, row(0), row(5), row(0)])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    sha = commit(tmp_path)
    _, _, items = read(revision="main", data_files="*.parquet", id_column="id")
    broken, first, *rejects, again, last, twice = items
    assert broken[0] == "broken" and broken[1].startswith("unreadable: ")
    assert first[:3] == [
        "u0",
        hashlib.sha256(encoded(7)).hexdigest(),
        f"hf://datasets/me/speech@{sha}/clips/x.wav",
    ]
    assert [reason.partition(": ")[0] for _, reason in rejects] == [
        "not found",
        "unsafe path",
        "unsafe path",
    ]
    assert len(again) == 7 and last[0] == "u5" and twice[1].startswith("duplicate id: ")

    said = read(revision="main", data_files="*.parquet", text_column="words")
    assert "no column 'words' (text_column); it has audio, text, id, who" in said
    said = read(revision="main", data_files="none-*.parquet")
    assert said == f"me/speech@{sha} has no file that matches none-*.parquet"
    (tmp_path / "speech.py").write_text("raise SystemExit('it was run')")
    commit(tmp_path)
    said = read(revision="main", data_files="none-*.parquet")
    assert said.endswith("; it is a loading script, which is not run")
    assert "no such branch" in read(revision="other", data_files="*.parquet")
