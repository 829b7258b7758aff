"""Speech tasks as records: what the model is shown, what is scored, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speechfuse.evals import generation, items, speech
from speechfuse.evals.generation import Generator
from speechfuse.evals.items import read_transcripts
from speechfuse.rows import shards
from speechfuse.scores.judge import Judge
from speechfuse.tokens.vocabulary import Vocabulary
from tests import eval_results
from tests.small_training import STREAM, dataset, make_parts

TEXTS = ["red blue green", "cat dog", "sun", "big small red blue", "green green", "cat red"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """An expanded tiny checkpoint, and `evaluation`: six utterances in two splits."""
    folder = make_parts(tmp_path_factory.mktemp("speech_tasks"))
    rows = [
        {
            "id": f"u{i}",
            "codes": [i, i + 1, i + 2],
            "seconds": 1.0 + 6 * i,
            "text": text,
            "speaker": f"speaker {i % 2}",
            "source": {"uri": f"{i}.wav"},
            "extra": json.dumps({"part": "ab"[i % 2], "instruction": f"ask {i}", "answer": str(i)}),
        }
        for i, text in enumerate(TEXTS)
    ]
    dataset(folder / "evaluation", shards.SPEECH, rows, STREAM)
    return folder


def task(parts: Path, **changes: Any) -> speech.Speech:
    return speech.Speech(
        **{"data": str(parts / "evaluation"), "metric": "wer", "max_new_tokens": 4, **changes}
    )


def shown(of: speech.Speech, checkpoint: Path, monkeypatch) -> dict[str, list[int]]:
    """Ids that the model is given for each item."""
    seen: list[list[int]] = []

    def record(self, ids, max_new_tokens):
        seen.extend(ids)
        return [{"reply": "x", "tokens": 1, "capped": False}] * len(ids)

    monkeypatch.setattr(Generator, "_generate", record)
    said = [entry for batch in of.predict(checkpoint, of.ids()) for entry in batch]
    return {entry["id"]: ids for entry, ids in zip(said, seen, strict=True)}


def replied(of: speech.Speech, replies: list[str]) -> list[dict]:
    return [
        {"id": id, "reply": reply, "tokens": 3, "capped": False}
        for id, reply in zip(of.ids(), replies, strict=True)
    ]


def test_the_audio_stands_where_the_prompt_says(parts, monkeypatch):
    checkpoint = parts / "expanded"
    words = Vocabulary.load(checkpoint)
    of = task(parts, prompt="say {instruction}: {speech} now")
    user, assistant = words.header("user"), words.header("assistant")
    audio = words.sound([2, 3, 4])
    assert shown(of, checkpoint, monkeypatch)["u2"] == [
        words.begin,
        *user,
        *words.text("say ask 2: "),
        *audio,
        *words.text(" now"),
        words.end_of_turn,
        *assistant,
    ]
    alone = shown(task(parts), checkpoint, monkeypatch)["u2"]
    assert alone == [words.begin, *user, *audio, words.end_of_turn, *assistant]


def test_an_earlier_question_and_its_right_answer_may_stand_before(parts, monkeypatch):
    words, earlier = Vocabulary.load(parts / "expanded"), "speechfuse.samples.answer"
    of = task(parts, earlier={"_component_": earlier, "repeat_first": True})
    user, assistant = words.header("user"), words.header("assistant")
    asked = shown(of, parts / "expanded", monkeypatch)
    assert asked["u2"] == [
        *(words.begin, *user, *words.sound([1, 2, 3]), words.end_of_turn),
        *(*assistant, *words.text("cat dog\n1"), words.end_of_turn),
        *(*user, *words.sound([2, 3, 4]), words.end_of_turn, *assistant),
    ]
    assert of.inputs() != task(parts).inputs()


def test_transcripts_of_one_id_are_refused(tmp_path):
    path, lines = tmp_path / "t.jsonl", [json.dumps({"id": id, "text": "x"}) for id in ("1", "2")]
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode())
    assert items.read_transcripts(path) == {"1": "x", "2": "x"}
    path.write_text("\n".join([*lines, '{"id": 1, "text": "y"}']))
    with pytest.raises(ValueError, match=r"t\.jsonl, line 3: the id 1 comes twice"):
        items.read_transcripts(path)


def test_transcripts_instead_of_audio_need_no_sound_tokens(parts, tmp_path, monkeypatch, capsys):
    words = Vocabulary.load(parts / "init")
    of = task(parts, prompt="answer: {speech}!", input="transcript")
    of.check(parts / "init")
    ids = shown(of, parts / "init", monkeypatch)["u1"]
    assert words.tokenizer.decode(ids).count("answer: cat dog!") == 1
    lines = [{"id": f"u{i}", "text": f"heard {i}"} for i in range(6)]
    file = tmp_path / "asr.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cascade = replace(of, transcripts=str(file))
    assert cascade.inputs() != of.inputs()
    ids = shown(cascade, parts / "init", monkeypatch)["u1"]
    assert "answer: heard 1!" in words.tokenizer.decode(ids)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    with pytest.raises(ValueError, match="has no transcript of 2 of 6 items, 'u4' the first"):
        replace(of, transcripts=str(file)).check(parts / "init")
    lines[2]["text"] = " \u00a0"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replace(of, transcripts=str(file)).check(parts / "init")  # a recognizer may hear nothing
    assert "asr.jsonl: 1 of 6 transcripts are empty" in capsys.readouterr().out


def test_shuffled_audio_is_always_that_of_another_reference(parts, monkeypatch):
    words = Vocabulary.load(parts / "expanded")
    right = shown(task(parts), parts / "expanded", monkeypatch)
    wrong = shown(task(parts, input="shuffled"), parts / "expanded", monkeypatch)
    assert right.keys() == wrong.keys() and all(right[id] != wrong[id] for id in right)
    assert sorted(right.values()) == sorted(wrong.values())  # the same audio, dealt out again
    assert words.layout is not None
    by_part = task(parts, input="shuffled", reference="part")  # may pair others
    assert by_part.inputs() != task(parts, input="shuffled").inputs()
    with pytest.raises(ValueError, match="every item's reference is 'a'"):
        part = {"a": {"part": "a"}}
        task(parts, input="shuffled", reference="part", splits=part).check(parts / "expanded")
    assert task(parts, reference="part").inputs() == task(parts).inputs()  # asks the same


def test_the_blog_protocol_doubles_what_the_blog_doubled(parts, monkeypatch):
    checkpoint, name = parts / "expanded", "<|eom_id|>"
    words = Vocabulary.load(checkpoint)
    of = task(parts, prompt=f"{name}{name}{{speech}}", protocol="blog")
    ids = shown(of, checkpoint, monkeypatch)["u0"]
    control = words.tokenizer.convert_tokens_to_ids(name)
    assert ids[:2] == [words.begin] * 2 and ids.count(control) == 2
    clean = shown(replace(of, protocol="clean"), checkpoint, monkeypatch)["u0"]
    assert clean[:2] != [words.begin] * 2 and clean.count(control) == 0  # text, not a command
    assert of.inputs() != replace(of, protocol="clean").inputs()


def test_a_list_under_a_split_means_any_of_its_values(parts):
    of = task(parts, splits={"b": {"part": "b"}, "both": {"part": ["a", "b"]}})
    scored = of.score(replied(of, ["red"] * 6))
    assert {s.split: s.n for s in scored.scores} == {"b": 3, "both": 6}


def test_wer_by_split_and_duration_and_what_each_item_got(parts):
    splits = {"a": {"part": "a"}, "b": {"part": "b"}, "all": {}}
    of = task(parts, splits=splits, cluster="speaker")
    replies = ["red blue green", "cat cat", "sun", "", "green green", "I'm sorry, no"]
    scored = of.score(replied(of, replies))
    values = {(s.split, s.metric): (s.value, s.n) for s in scored.scores}
    assert values["a", "wer"] == (0.0, 3)
    assert values["b", "wer"] == (pytest.approx((1 + 4 + 4) / 8), 3)
    assert eval_results.paired(scored) == {("a", "wer"), ("b", "wer")}  # "all": items of others
    assert values["b", "wer_capped"][0] == pytest.approx((1 + 4 + 2) / 8)
    assert [(item["errors"], item["words"]) for item in scored.items][3] == (4, 4)
    assert [item["split"] for item in scored.items] == list("ababab")
    assert {item["cluster"] for item in scored.items} == {"speaker 0", "speaker 1"}
    assert sum(n for _, _, n in scored.details["by_split"]["b"]["by_duration"]) == 3
    assert (scored.details["empty"], scored.details["refusals"], scored.details["loops"]) == (
        1,
        1,
        0,
    )


def test_a_loop_is_a_reply_without_end_or_one_that_repeats():
    def loops(reply: str, capped: bool = False) -> int:
        return generation.of_replies([reply], [capped])["loops"]

    assert loops("a b c " * 5) == 1 and loops("no " * 8) == 1 and loops("x", capped=True) == 1
    assert loops("a b c " * 2) == 0 and loops("") == 0


@pytest.mark.parametrize("metric", ["cer", "bleu", "rouge", "accuracy"])
def test_other_metrics_are_chosen_by_name(parts, metric):
    of = task(parts, metric=metric)
    of.check(parts / "expanded")
    scored = of.score(replied(of, TEXTS))
    best = scored.scores[0]
    assert eval_results.paired(scored) == ({("all", best.metric)} if metric != "bleu" else set())
    worst = of.score(replied(of, ["zzz"] * 6)).scores[0]
    assert best.value == pytest.approx({"cer": 0.0, "bleu": 100.0}.get(metric, 1.0))
    assert worst.value != best.value and best.n == 6 and best.split == "all"


def test_what_is_said_of_sound_without_speech_is_counted(parts, tmp_path):
    rows = [
        {"id": f"n{i}", "codes": [1], "seconds": s, "extra": "{}"} for i, s in enumerate((6, 54))
    ]
    dataset(tmp_path / "noise", shards.SPEECH, rows, STREAM)
    of = task(parts, data=str(tmp_path / "noise"), metric="hallucination", reference="seconds")
    of.check(parts / "expanded")
    (score,) = of.score(replied(of, ["", "thank you"])).scores
    assert (score.metric, score.split, score.value, score.n) == ("hallucination", "all", 9, 2)
    with pytest.raises(ValueError, match="row n0 has no 'text'"):
        replace(of, reference="text").check(parts / "expanded")


def test_a_judge_rates_and_what_it_leaves_out_is_not_zero(parts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    judge = {"_component_": "speechfuse.scores.Judge", "model": "stub"}
    of = task(parts, metric="judge", judge=judge, question="instruction", reference="answer")
    of.check(parts / "expanded")
    asked = []

    def verdicts(self, items):
        asked.extend(items)
        self.usage.items, self.usage.rated = len(items), len(items) - 1
        return {item["id"]: None if item["id"] == "u0" else 4.0 for item in items}

    monkeypatch.setattr(Judge, "verdicts", verdicts)
    scored = of.score(replied(of, TEXTS))
    assert (scored.scores[0].metric, scored.scores[0].value, scored.scores[0].n) == ("judge", 4, 5)
    assert eval_results.paired(scored) == {("all", "judge")}
    assert scored.details["coverage"] == pytest.approx(5 / 6) and scored.items[0]["value"] is None
    assert asked[1] == {"id": "u1", "question": "ask 1", "reference": "1", "answer": "cat dog"}
    assert of.scoring()["judge"]["model"] == "stub"


def test_items_of_the_training_data_are_named_and_left_out_of_a_second_score(parts):
    rows = [{"id": "t0", "codes": [9], "text": "big small red blue", "extra": "{}"}]
    training = dataset(parts / "training", shards.SPEECH, rows, STREAM)
    of = task(parts, contamination=[str(training)])
    of.check(parts / "expanded")
    replies = [*TEXTS]
    replies[3] = "wrong"  # what the training data holds, badly said
    scored = of.score(replied(of, replies))
    found = scored.details["contamination"]
    assert (found["exact"], found["codes"]) == (1, 0) and found["without_hits"] == 0.0
    assert [hit["id"] for hit in found["hits"]] == ["u3"] and scored.scores[0].value > 0
    assert of.scoring() != task(parts).scoring()


def questions(parts: Path, **changes: Any) -> speech.Speech:
    """Answers of which the first line is what was heard, with controls of the split a."""
    a = {"a": {"part": "a"}}
    settings = {
        "metric": "acc",
        "reference": "answer",
        "reply": {"_component_": "speechfuse.tokens.read_spoken_answer"},
        "cluster": "speaker",
        "splits": a,
        "transcript_splits": a,
        "controls_of": "a",
        "train": str(parts / "evaluation"),
        "name": "spoken",
    }
    return task(parts, **{**settings, **changes})


def test_a_reply_is_read_as_what_was_heard_and_the_answer(parts):
    of = questions(parts, cluster="instruction")
    of.check(parts / "expanded")
    assert of.ids() == ["u0", "u2", "u4"]
    scored = of.score(replied(of, ["red blue green\n0", "moon\n2", "Green  green\nfour"]))
    assert [(s.task, s.split, s.metric, s.value, s.n) for s in scored.scores] == [
        ("spoken", "a", "acc", pytest.approx(2 / 3), 3),
        ("spoken", "shuffled_audio", "acc", 0.0, 3),
        ("spoken", "majority_answer", "acc", pytest.approx(1 / 3), 3),  # the first of equals: 0
        ("question_transcript", "a", "wer", pytest.approx(1 / 6), 3),
        ("spoken", "a_heard_exactly", "acc", 0.5, 2),
    ]
    assert [item["heard"] for item in scored.items][1:] == ["moon", "Green  green"]
    assert [item["correct"] for item in scored.items] == [True, True, False]
    assert scored.details["mean_words"] == 1  # of the answers alone
    shared = questions(parts).score(replied(of, ["0", "2", "x"])).scores  # one speaker said all
    assert [s.split for s in shared] == ["a", "a"] and shared[1].value == 1.0


def test_an_answer_may_have_several_lines(parts):
    """What was heard is the first line alone; without `reply` all is the answer."""
    of = questions(parts, reference="recipe", cluster=None)
    of.rows["u0"]["extra"]["recipe"] = "Three steps:\n1. boil\n2. eat"
    first, wrong = (
        f"red blue green\n{text}" for text in ("Three steps:\n1. boil\n2. eat", "2. eat")
    )
    for reply, right in ((first, True), (wrong, False)):
        item = of._item(of.rows["u0"], {"reply": reply})
        assert item["heard"] == "red blue green"
        assert (item["answer"] == item["expected"]) is right
    whole = replace(of, reply=None, transcript_splits={}, controls_of=None)
    assert whole._item(of.rows["u0"], {"reply": "a\nb"})["answer"] == "a\nb"


def test_splits_choose_by_a_rows_own_columns_and_may_be_empty_where_it_is_said(parts):
    of = task(parts, splits={"one": {"speaker": "speaker 1"}, "none": {"speaker": "x"}})
    with pytest.raises(ValueError, match="is in none; correct what it selects, or name it"):
        of.ids()
    assert replace(of, may_be_empty=["none"]).ids() == ["u1", "u3", "u5"]


def test_a_transcript_can_be_asked_for_by_itself(parts, monkeypatch):
    checkpoint = parts / "expanded"
    words = Vocabulary.load(checkpoint)
    of = questions(parts, transcribe="repeat: {speech}", batch_size=2)
    of.check(checkpoint)
    assert of.inputs() != questions(parts, batch_size=2).inputs()
    repeat = words.text("repeat: ")

    def record(self, ids, max_new_tokens):
        asks = [any(row[i : i + len(repeat)] == repeat for i in range(len(row))) for row in ids]
        texts = ["sun" if each else "sky\n2" for each in asks]
        return [{"reply": text, "tokens": 1, "capped": False} for text in texts]

    monkeypatch.setattr(Generator, "_generate", record)
    scored = of.score([entry for batch in of.predict(checkpoint, of.ids()) for entry in batch])
    assert {(item["heard"], item["answer"]) for item in scored.items} == {("sun", "2")}
    in_text = questions(parts, input="transcript")
    items = in_text.score(replied(in_text, ["0", "2", "4"])).items
    assert [item["heard"] for item in items] == [item["question"] for item in items]


def test_what_answers_is_named_by_the_checkpoint(parts, tmp_path, monkeypatch):
    """By the dotted path `generator` in its config.json; without one it is Generator."""
    config = json.loads((parts / "expanded/config.json").read_text())
    for dotted in ("pathlib.PurePosixPath", "speechfuse.evals.generation.of_replies"):
        config["speechfuse"]["generator"] = dotted
        (tmp_path / "config.json").write_text(json.dumps(config))
        if dotted.startswith("pathlib"):
            with pytest.raises(ValueError, match=r"generator pathlib.* which is not ours"):
                generation.generator(tmp_path, "x", "y")
    monkeypatch.setattr(generation, "of_replies", lambda *arguments: arguments)
    assert generation.generator(tmp_path, "x", "y") == (tmp_path, "x", "y")
    monkeypatch.setattr(generation, "Generator", lambda *arguments: arguments)
    assert generation.generator(parts / "expanded", None, "x") == (parts / "expanded", None, "x")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "werr"}, "metric=werr: choose one of wer, cer"),
        ({"input": "text"}, "input=text: choose one of speech, transcript, shuffled"),
        ({"protocol": "mine"}, "protocol=mine: choose one of clean, blog"),
        ({"prompt": "transcribe"}, "must hold {speech} once"),
        (
            {"prompt": "{instructoin} {speech}"},
            "has no 'instructoin'; there are id, text, .*answer",
        ),
        ({"reference": "answr"}, "row u0 has no 'answr'; there are .*answer"),
        ({"cluster": "language"}, "row u0 has no 'language'"),
        ({"splits": {"a": {"part": "c"}}}, "has no row of the splits a"),
        ({"splits": {"a": {"part": "a"}, "typo": {"prat": "b"}}}, "splits: no row .* is in typo"),
        (
            {"transcript_splits": {"x": {"part": "x"}}, "transcribe": "{speech}"},
            "splits: no row of .* is in x",
        ),
        ({"metric": "judge"}, "metric judge and a judge belong together"),
        ({"transcripts": "x"}, "set input=transcript"),
        ({"transcribe": "repeat"}, "transcribe='repeat' must hold {speech} once"),
        ({"transcript_splits": {"a": {}}}, "transcript_splits need `reply`"),
        ({"controls_of": "b"}, r"controls_of=b: choose one of \['all'\]"),
        ({"train": "nowhere"}, "nowhere does not exist"),
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"contamination": ["nowhere"]}, "nowhere does not exist"),
        ({"earlier": {"_component_": "x"}, "input": "shuffled"}, "earlier stands before speech"),
    ],
)
def test_what_does_not_fit_is_named(parts, changes, says):
    with pytest.raises(ValueError, match=says):
        task(parts, **changes).check(parts / "expanded")


def test_a_judge_needs_its_key_and_its_protocol(parts, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = {"_component_": "speechfuse.scores.Judge", "model": "m"}
    of = task(parts, metric="judge", judge=judge)
    with pytest.raises(ValueError, match="no key in the environment variable OPENAI_API_KEY"):
        of.check(parts / "expanded")
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with pytest.raises(ValueError, match="protocol=blog needs another judge"):
        task(parts, metric="judge", judge=judge, protocol="blog").check(parts / "expanded")


def test_a_checkpoint_of_another_quantizer_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="no sound tokens: run `just expand`"):
        task(parts).check(parts / "init")
    config = json.loads((parts / "expanded/config.json").read_text())
    config["speechfuse"]["quantizer"] = "1" * 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"was made with quantizer 0000.* expanded for 1111"):
        task(parts).check(tmp_path)


def test_replies_do_not_depend_on_where_a_decoding_was_stopped(parts):
    of = task(parts, batch_size=2)
    batches = list(of.predict(parts / "expanded", of.ids()))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    left = [entry["id"] for batch in batches[1:] for entry in batch]
    assert list(of.predict(parts / "expanded", left)) == batches[1:]
    assert all(entry["tokens"] <= 4 for batch in batches for entry in batch)


def test_replies_are_drawn_where_it_is_asked_for(parts):
    """By temperature, top_k, top_p and repetition_penalty, alike in every run; else greedy."""
    expanded, greedy, few = parts / "expanded", task(parts), {"temperature": 5.0, "top_k": 1}
    drawn = task(parts, sampling={"temperature": 50.0, "top_k": 200, "top_p": 0.99})
    said = [list(each.predict(expanded, each.ids())) for each in (greedy, drawn, drawn)]
    assert said[0] != said[1] == said[2]
    likeliest = [task(parts, sampling=each) for each in (few, {"temperature": 5.0, "top_p": 1e-6})]
    assert all(list(each.predict(expanded, each.ids())) == said[0] for each in likeliest)
    repeats = task(parts, sampling={"repetition_penalty": 0.01})  # greedy, and likelier again
    assert list(repeats.predict(expanded, repeats.ids())) != said[0]
    assert "sampling" not in greedy.inputs() and drawn.inputs()["sampling"]["top_k"] == 200
    for settings, why in {
        ("top_k", 5): "need a temperature",
        ("temperature", 0): "temperature",
        ("top_p", 2.0): "top_p",
        ("greedy", True): "unknown argument 'greedy'",
    }.items():
        with pytest.raises(ValueError, match=why):
            task(parts, sampling=dict([settings])).check(expanded)


def test_weights_that_are_not_finite_are_named(parts, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in (parts / "expanded").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"][3, 1] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of lm_head\.weight are not finite"):
        generation.load(tmp_path, "cpu")


def test_a_limit_takes_items_of_every_split_though_voices_take_turns():
    rows = {f"{fact} {voice}": {} for fact in range(90) for voice in "abc"}
    found = [[id for id in rows if id.endswith(voice)] for voice in "abc"]
    kept = items.subset(rows, found, 9)
    assert [sum(id.endswith(voice) for id in kept) for voice in "abc"] == [3, 3, 3]
    assert list(items.subset(rows, found, None)) == list(rows)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "a", "text": null}', "the text of a is None, not text"),
        ('{"id": "a"}', "the text of a is None, not text"),
        ('{"text": "x"}', "its id is None, no name"),
        ("x", "not JSON"),
    ],
)
def test_a_line_that_is_no_transcript_is_refused(tmp_path, line, says):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"id": "b", "text": "x"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"transcripts: .*t\.jsonl, line 3: {says}.*JSON lines"):
        read_transcripts(path)
