"""The demo's text_mmlu, an lm-eval task: the model sees the ids of training, the best reply wins,
nothing is cached."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from speechfuse.evals.harness import Harness
from speechfuse.evals.harness_model import LastPosition
from speechfuse.tokens.prompts import render
from speechfuse.tokens.vocabulary import Vocabulary
from tests.demo_code import demo
from tests.small_training import ROOT

train_tokenizer = demo("init_base").train_tokenizer

QUESTIONS = [  # question, right answer, three others
    ("what is ten plus ten", "twenty", "twenty one", "two", "ten"),
    ("what is ten plus eleven", "twenty one", "twenty", "one", "eleven"),
    ("name the capital of france", "paris", "lima", "cairo", "new delhi"),
    ("name the capital of india", "new delhi", "new", "paris", "delhi"),
    ("what does a cow say?", "moo", "moo moo", "meow", 'it\'s a "moo" | <b>'),
    ("10", "ten", "10", "zero", "{{ question }}"),  # what lm-eval would take for a number or code
    ("line one\n\nline two: {x}", "yes, both.\nreally", "yes, both.", "no", "\u00fc'\\n"),
]


def rows(questions: list[tuple[str, ...]] = QUESTIONS) -> list[dict]:
    made = []
    for i, (question, right, *others) in enumerate(questions):
        choices = list(others)
        choices.insert(i % 4, right)
        made.append(
            {
                "question": question,
                "subject": "world",
                "choices": choices,
                "answer": i % 4,
                "fact": f"fact-{i}",
            }
        )
    return made


def mistaken() -> list[dict]:
    """The same rows with another choice marked as the right one."""
    return [{**row, "answer": (row["answer"] + 1) % 4} for row in rows()]


def write(folder: Path, rows: list[dict], subject: str = "replayed") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{subject}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text_task(folder: Path, batch_size: int = 64, **changes) -> Harness:
    settings = {"task": "replayed", "include": str(ROOT / "recipes/demo/tasks"), **changes}
    return Harness(data=str(folder), apply_chat_template=True, batch_size=batch_size, **settings)


def multiple_choice(checkpoint: Path, folder: Path, batch_size: int) -> list[dict]:
    """{"correct", "said"} of each item of the task."""
    task = text_task(folder, batch_size)
    task.check(checkpoint)
    (batch,) = task.predict(checkpoint, task.ids())
    scored = task.score(batch)
    assert [item["id"] for item in scored.items] == task.ids()
    assert scored.scores[0].value == sum(item["correct"] for item in scored.items) / len(batch)
    return [{"correct": item["correct"], "said": item["said"]} for item in scored.items]


def user(question: str) -> list[dict]:
    return [{"role": "user", "segments": [{"text": question}]}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama, untrained, and the same one after learning the answers by heart."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer([" ".join(q) for q in QUESTIONS] + ["user assistant\n\n"] * 9, 400)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    paths = {name: folder / name for name in ("untrained", "knows")}
    for name, path in paths.items():
        if name == "knows":
            learn(model, Vocabulary(tokenizer, None))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def learn(model: LlamaForCausalLM, vocabulary: Vocabulary) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    samples = []
    for question, right, *_ in QUESTIONS:
        turns = [*user(question), {"role": "assistant", "segments": [{"text": right}]}]
        samples.append(render(vocabulary, turns))
    length = max(len(ids) for ids, _ in samples)
    tokens = torch.full((len(samples), length), vocabulary.end)
    labels = torch.full((len(samples), length), -100)
    for i, (ids, targets) in enumerate(samples):
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, : len(ids)] = torch.where(torch.tensor(targets), torch.tensor(ids), -100)
    for _ in range(100):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def reply_likelihoods(checkpoint: Path, row: dict) -> list[float]:
    """log P(choice, end of turn | prompt) of each choice, straight from transformers."""
    vocabulary = Vocabulary.load(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    prompt, _ = render(vocabulary, user(row["question"]), add_generation_prompt=True)
    found = []
    for choice in row["choices"]:
        reply = [*vocabulary.text(choice), vocabulary.end_of_turn]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        logs = logits.log_softmax(-1)[range(len(reply)), reply]
        found.append(float(logs.sum()))
    return found


def test_a_model_that_knows_the_answers_scores_1(checkpoints, tmp_path, capfd):
    folder = write(tmp_path / "mmlu", rows())
    items = multiple_choice(checkpoints["knows"], folder, 4)
    expected = [{"correct": True, "said": row["answer"]} for row in rows()]
    assert items == expected  # also where one choice is the start of another
    assert all(type(item["correct"]) is bool and type(item["said"]) is int for item in items)
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.count("\n") <= 1 and "loglikelihood" not in shown.err
    folder = write(tmp_path / "mmlu", mistaken())
    items = multiple_choice(checkpoints["knows"], folder, 4)
    assert not any(item["correct"] for item in items)


def test_scores_by_subject(checkpoints, tmp_path):
    folder = write(tmp_path / "mmlu", rows(), "replayed")
    write(folder, mistaken(), "not_replayed")
    task, count = text_task(folder, task="text_mmlu"), len(QUESTIONS)
    assert len(task.ids()) == 2 * count
    said = list(task.predict(checkpoints["knows"], task.ids()))
    assert [len(batch) for batch in said] == [count] * 2  # a batch a subject
    scored = task.score([*said[0], *said[1]])
    assert [(s.task, s.split, s.metric, s.value, s.n) for s in scored.scores] == [
        ("", "not_replayed", "acc", 0.0, count),
        ("", "replayed", "acc", 1.0, count),
    ]  # and none of all, as the group aggregates nothing
    assert [item["split"] for item in scored.items] == ["not_replayed"] * count + [
        "replayed"
    ] * count
    (rest,) = task.predict(checkpoints["knows"], task.ids()[count:])
    assert rest == said[1]  # what a resumed cell asks for


def test_a_limit_takes_items_at_equal_distances(tmp_path):
    folder = write(tmp_path / "mmlu", rows())
    whole, some = text_task(folder), text_task(folder, limit=3)
    assert some.ids() == ["replayed/0", "replayed/2", "replayed/4"]
    assert some.inputs() != whole.inputs() and len(whole.ids()) == len(QUESTIONS)
    with pytest.raises(ValueError, match="limit=0: at least 1"):
        text_task(folder, limit=0).ids()


def test_a_changed_task_file_is_another_key(tmp_path):
    folder = write(tmp_path / "mmlu", rows())
    tasks = shutil.copytree(ROOT / "recipes/demo/tasks", tmp_path / "tasks")
    before = text_task(folder, include=str(tasks)).inputs()
    assert before == text_task(folder).inputs()  # wherever the files lie
    path = tasks / "_question_yaml"
    path.write_text(path.read_text().replace("doc_to_text: question", "doc_to_text: subject"))
    assert text_task(folder, include=str(tasks)).inputs() != before


def test_the_model_is_shown_the_ids_of_prompts_render(checkpoints, tmp_path, monkeypatch):
    seen = []
    call = LastPosition._last

    def record(self, inputs, read):
        seen.extend(inputs)
        return call(self, inputs, read)

    monkeypatch.setattr(LastPosition, "_last", record)
    multiple_choice(checkpoints["untrained"], write(tmp_path / "mmlu", rows()), 1)
    vocabulary = Vocabulary.load(checkpoints["untrained"])
    expected = set()
    for row in rows():
        prompt, _ = render(vocabulary, user(row["question"]), add_generation_prompt=True)
        # the end of the turn is predicted, so it is not among the inputs
        expected |= {(*prompt, *vocabulary.text(choice)) for choice in row["choices"]}
    assert set(seen) == expected and len(expected) == 4 * len(QUESTIONS)
    assert all(ids.count(vocabulary.begin) == 1 and ids[0] == vocabulary.begin for ids in seen)


def test_a_choice_is_scored_by_the_whole_reply(checkpoints, tmp_path):
    checkpoint = checkpoints["untrained"]
    lm = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=3)
    folder = write(tmp_path / "mmlu", rows())
    items = multiple_choice(checkpoint, folder, 3)
    tasks = {"tasks": text_task(folder).loaded}
    theirs = evaluate(
        lm, tasks, bootstrap_iters=0, apply_chat_template=True, fewshot_as_multiturn=True
    )["samples"]["replayed"]
    for row, sample, item in zip(rows(), theirs, items, strict=True):
        expected = torch.tensor(reply_likelihoods(checkpoint, row))
        found = torch.tensor([likelihood for likelihood, _ in sample["filtered_resps"]])
        # lm-eval counts the line break before the reply to each choice; it is the same for all
        torch.testing.assert_close(found - found[0], expected - expected[0], atol=1e-3, rtol=0)
        assert item["said"] == int(expected.argmax())


def test_an_untrained_model_guesses(checkpoints, tmp_path):
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    questions = [
        (f"what is {a} and {b}", *(words[(a_ + b_ * 5 + 3 * i) % 12] for i in range(4)))
        for a_, a in enumerate(words)
        for b_, b in enumerate(words)
    ]
    items = multiple_choice(checkpoints["untrained"], write(tmp_path / "mmlu", rows(questions)), 64)
    assert sum(item["correct"] for item in items) / len(items) == pytest.approx(0.25, abs=0.11)


def test_nothing_is_remembered_and_the_batch_does_not_matter(checkpoints, tmp_path):
    folder = write(tmp_path / "mmlu", rows())
    path = folder / "replayed.jsonl"
    knows = multiple_choice(checkpoints["knows"], folder, 64)
    guesses = multiple_choice(checkpoints["untrained"], folder, 64)
    assert knows != guesses
    assert multiple_choice(checkpoints["knows"], folder, 1) == knows
    assert multiple_choice(checkpoints["untrained"], folder, 5) == guesses
    before = path.stat()
    turned = rows()
    for row in turned:
        row |= {"choices": row["choices"][::-1], "answer": 3 - row["answer"]}
    write(folder, turned)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same name, size and time
    assert path.stat().st_size == before.st_size
    again = multiple_choice(checkpoints["knows"], folder, 64)
    assert [item["said"] for item in again] == [3 - item["said"] for item in knows]


def test_the_network_is_not_asked(checkpoints, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(checkpoints["knows"].parent.parent)  # a path of two parts, like a repository
    relative = Path(checkpoints["knows"].parent.name) / "knows"
    items = multiple_choice(relative, write(tmp_path / "mmlu", rows()), 8)
    assert all(item["correct"] for item in items)


@pytest.mark.parametrize("how", ["template", "control token"])
def test_prompts_other_than_those_of_training_are_refused(checkpoints, tmp_path, how):
    checkpoint, made = checkpoints["knows"], rows()
    if how == "template":
        vocabulary = Vocabulary.load(checkpoint)
        tokenizer, checkpoint = vocabulary.tokenizer, tmp_path / "other"
        AutoModelForCausalLM.from_pretrained(checkpoints["knows"]).save_pretrained(checkpoint)
        tokenizer.chat_template = f"{tokenizer.bos_token}{tokenizer.chat_template}"
        tokenizer.save_pretrained(checkpoint)
    else:
        made[0]["question"] += "<|eot_id|>"
    with pytest.raises(ValueError, match="not tokenized as in training"):
        multiple_choice(checkpoint, write(tmp_path / "mmlu", made), 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choices": ["a", "b", "c"]}, "question replayed/1: its choices cannot be read"),
        ({"choices": "abcd"}, "the list of its choices 'abcd' must be texts"),
        ({"choices": ["a", "b", "c", ""]}, "question replayed/1: .* must be texts, none of them"),
        ({"choices": ["a", "b", "c", 4]}, "must be texts, none of them empty"),
        ({"answer": 4}, "question replayed/1: answer=4 must be the index of one of 4 choices"),
        ({"answer": "A"}, "answer='A' must be the index"),
        ({"answer": True}, "answer=True must be the index"),
        ({"question": None}, "must be texts, none of them empty"),
    ],
)
def test_a_row_that_is_no_question_is_named(checkpoints, tmp_path, change, says):
    first, second, *_ = rows()
    folder = write(tmp_path / "mmlu", [first, {**second, **change}])
    with pytest.raises(ValueError, match=says):
        multiple_choice(checkpoints["knows"], folder, 8)


def test_a_folder_without_questions_is_named(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="missing is no folder"):
        multiple_choice(checkpoints["knows"], tmp_path / "missing", 8)
    folder = write(tmp_path / "mmlu", [])
    with pytest.raises(ValueError, match="mmlu cannot be loaded"):
        multiple_choice(checkpoints["knows"], folder, 8)
    (folder / "replayed.jsonl").write_text('{"question": "what"}\n')
    with pytest.raises(ValueError, match="choices"):
        multiple_choice(checkpoints["knows"], folder, 8)


def test_scores_with_the_speech_part_on_are_splits_of_their_own(tmp_path):
    folder = write(tmp_path / "data", rows())
    off, on = text_task(folder), text_task(folder, speech_on=True, name="text_mmlu")
    assert on.ids() == off.ids()
    said = [{"id": id, "doc_hash": "", "metrics": {"acc": 1.0}, "said": "a"} for id in off.ids()]
    scores = [task.score(said).scores for task in (off, on)]
    assert {(s.task, s.split.removesuffix("_speech_on")) for s in scores[1]} == {
        ("text_mmlu", s.split) for s in scores[0]
    }
    assert all(s.split.endswith("_speech_on") and s.n == len(said) for s in scores[1])
    assert "speech_on" not in off.inputs() and on.inputs()["speech_on"] is True
