"""What is scored of a model of two channels: through the task of an evaluation, and its judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechfuse import config
from speechfuse.codecs.codec import codec_of
from speechfuse.corpora.sessions import Sessions as Corpus
from speechfuse.evals import sweep
from speechfuse.evals.recognizer import Recognizer
from speechfuse.evals.sessions import Sessions
from speechfuse.rows import shards
from speechfuse.train import loop
from stages import build_duplex, evaluate, report
from tests.small_channels import FRAMES, WIDTH, duplex, parts_of
from tests.small_sessions import CODEC, FOLDER, texts
from tests.small_sessions import job as building
from tests.small_training import dataset, job

pytest.importorskip("pocketsphinx", reason="it has no wheel of Python 3.12")
SPOKEN = {"bleat": "B L IY T", "gosling": "G AA Z L IH NG"}
SPOKEN |= {"hatchling": "HH AE CH L IH NG", "oink": "OY NG K"}
SPLITS = {"split": "seen_facts"}, {"split": "unseen_facts"}
KINDS = {"answer": 0.5, "pause": 0.25, "user_only": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sessions with random frames, and a model that has learned nothing from others."""
    folder = parts_of(tmp_path_factory.mktemp("evaluation"))
    made = building(texts(folder / "asked"), folder / "sound", kinds=KINDS)
    build_duplex.main(made)
    rows, chance = [], np.random.default_rng(0)
    corpus = Corpus(str(folder / "sound"))
    clips = (clip for shard in corpus.plan(0) for clip in corpus.clips(shard))
    for number, clip in enumerate(clips):
        frames = chance.standard_normal((round(clip.seconds * 25), WIDTH)).astype(np.float16)
        source = {"uri": clip.uri, "offset": clip.offset, "seconds": clip.seconds}
        row = {"id": clip.id, "text": "", "seconds": clip.seconds, "source": source}
        rows.append(
            row | {"extra": json.dumps(clip.extra | SPLITS[number % 2]), "frames": frames.tobytes()}
        )
    dataset(folder / "data", shards.FRAMES, rows, FRAMES)
    loop.run(job(duplex(folder, folder / "trained", steps=3)))
    return folder


def task(folder: Path, **changes: Any) -> Sessions:
    keys = {"data": folder / "data", "sound": folder / "sound", "words": FOLDER}
    paths = {name: str(path) for name, path in keys.items()} | {"clips": str(folder / "clips")}
    return Sessions(**paths, splits={"all": {}}, spoken=SPOKEN, **changes)


def scores(
    task: Sessions, entries: list[dict[str, Any]], split: str = "all"
) -> dict[tuple[str, str], Any]:
    by_id = {entry["id"]: entry for entry in entries}
    found = task.score([by_id[id] for id in task.ids()]).scores
    return {(each.task, each.metric): each for each in found if each.split == split}


def predicted(task: Sessions, checkpoint: Path) -> list[dict[str, Any]]:
    task.check(checkpoint)
    return [entry for batch in task.predict(checkpoint, task.ids()) for entry in batch]


def test_the_recognizer_hears_words_alone_and_forgets_each_clip():
    rows = [row for row in shards.read_rows(FOLDER) if "reply" in row["extra"]][::300]
    codec, every = codec_of(CODEC), {w for row in rows for w in row["text"].split()}
    clips = [codec.decode(row["codes"].reshape(-1, codec.codebooks)) for row in rows]
    judge = Recognizer(every | {"won", "one", "oink"}, SPOKEN)
    heard = [judge.hear(clip) for clip in clips]
    assert [judge.hear(clip) for clip in clips[::-1]] == heard[::-1]
    pairs = [
        (a, b)
        for row, text in zip(rows, heard, strict=True)
        for a, b in zip(row["text"].split(), text.split(), strict=False)
    ]
    assert np.mean([a == b for a, b in pairs]) > 0.7
    assert judge.hear(np.zeros(8000, np.float32)).split() in ([], *([word] for word in every))
    assert judge.plain("Won two") == judge.plain("one two") != "won two"
    with pytest.raises(ValueError, match="no sound of oink, zzz: say it in `spoken`"):
        Recognizer({"one", "zzz", "oink"}, {})


def test_the_ceiling_is_of_the_built_replies(folder):
    ceiling = task(folder, codec=CODEC)
    found = scores(ceiling, predicted(ceiling, FOLDER))
    assert {of for of, _ in found} == {"spoken_answer"}
    assert found["spoken_answer", "wer"].value < 0.4 and found["spoken_answer", "bleu"].value > 40
    assert found["spoken_answer", "acc"].value > 0.4 and found["spoken_answer", "acc"].n == 12


def test_a_model_is_heard_beside_its_user(folder):
    own = task(folder, tail=1.0, limit=6)
    entries = predicted(own, folder / "trained/epoch_0")
    assert {("turn_taking", "started"), ("text_answer", "acc")} <= scores(own, entries).keys()
    for entry in entries:
        sound, rate = soundfile.read(own.clips.replace("clips", entry["audio"]))
        seconds = own.rows[entry["id"]]["seconds"]
        assert sound.shape == (pytest.approx(rate * (seconds + 1), abs=1300), 2)
        assert np.abs(sound[: int(rate * seconds), 0]).max() > 0
    assert [batch for batch in own.predict(folder, [])] == []
    with pytest.raises(ValueError, match="codec"):
        own.check(FOLDER)


def said_by(task: Sessions, early: float = 0.0) -> list[dict[str, Any]]:
    """What a model says that knows the replies, so many seconds earlier; unasked where `early`."""
    entries = []
    for id, row in task.rows.items():
        turns = [turn for turn in row["extra"]["turns"] if turn["role"] == "assistant"]
        turns = turns or [{"start": 9.0, "end": 9.5, "text": "no"}] * bool(early)
        said = [
            {"text": t["text"], "heard": " ".join(t["text"].split()), "end": t["end"]}
            | {"start": max(t["start"] - early, 0.01 + row["extra"]["turns"][0]["start"])}
            for t in turns
        ]
        entries.append({"id": id, "said": said, "audio": ""})
    return entries


def test_a_model_that_knows_all_and_one_that_talks_at_once(folder):
    own = task(folder)
    best = scores(own, said_by(own))
    assert all(best[of, "acc"].value == 1 for of in ("text_answer", "spoken_answer"))
    assert best["spoken_answer", "wer"].value == 0 == best["spoken_as_written", "wer"].value
    turns = {metric: each.value for (of, metric), each in best.items() if of == "turn_taking"}
    assert turns["started"] == 1 and turns["early"] == 0 == turns["false_alarm"]
    assert 0.4 < turns["latency"] < 1.2 and turns["gap"] == pytest.approx(turns["latency"], abs=0.3)
    worst = scores(own, said_by(own, 99.0))
    assert worst["turn_taking", "started"].value == 0 and worst["turn_taking", "early"].value == 1
    assert worst["turn_taking", "false_alarm"].value == 1 == worst["text_answer", "acc"].value
    shuffled = scores(own, said_by(own), "shuffled_audio")
    assert shuffled["text_answer", "acc"].value == 0 == shuffled["spoken_answer", "acc"].value


def test_the_recipes_score_and_report(folder, tmp_path):
    recipes, trained = Path("recipes/demo"), folder / "trained"
    keys = [f"checkpoints.0.path={trained}/epoch_0", "checkpoints.2=null", "runtime.threads=1"]
    for name in ("sessions", "sessions_codec"):
        keys += [f"tasks.{name}.{key}={folder / key}" for key in ("data", "sound")]
        keys += [f"tasks.{name}.clips={tmp_path / 'clips'}"]
    keys, evals = [*keys, f"out={tmp_path / 'evals'}"], f"evals={tmp_path / 'evals'}"
    evaluate.main(config.load(sweep.Evaluate, recipes / "evaluate_duplex.yaml", keys))
    keys = [f"out={tmp_path}", evals, f"runs.0.path={trained}"]
    report.main(config.load(report.Report, recipes / "report_duplex.yaml", keys))
    rows = json.loads((tmp_path / "report.json").read_text())
    found = {(row["checkpoint"], row["task"], row["split"], row["metric"]) for row in rows}
    for split in ("seen_facts_unseen_voices", "unseen_facts_unseen_voices"):
        for metric in ("acc", "wer", "bleu"):
            assert ("duplex", "spoken_answer", split, metric) in found
            assert ("codec_ceiling", "spoken_answer", split, metric) in found
        assert ("duplex", "turn_taking", split, "started") in found
    assert ("duplex", "text_answer", "shuffled_audio", "acc") in found
    assert "<audio" in (tmp_path / "report.html").read_text()
