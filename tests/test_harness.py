"""MMLU through lm-eval's official group equals a direct run of lm-eval, item by item, offline."""

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from speechfuse.evals import harness
from speechfuse.evals.harness import SUBJECTS, Harness
from speechfuse.evals.harness_model import compiled_once, harness_model
from tests import eval_results
from tests.demo_code import demo
from tests.mmlu_folder import question, write_mmlu

train_tokenizer = demo("init_base").train_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    words = [question(subject, "test", i)["question"] for subject in SUBJECTS for i in range(2)]
    tokenizer = train_tokenizer([*words, "Answer: A B C D\n"] * 3, 600)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=2048,
        initializer_range=0.5,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory) -> Path:
    return write_mmlu(tmp_path_factory.mktemp("mmlu"))


@pytest.fixture(scope="module")
def whole(mmlu) -> Harness:
    task = Harness("mmlu", str(mmlu), 0)
    assert len(task.loaded) == 57
    return task


def like(whole: Harness, **changes) -> Harness:
    """The same task with other settings, without loading 57 subjects again."""
    task = replace(whole, **changes)
    for loaded in whole.loaded.values():
        loaded.set_config("num_fewshot", None)  # as it is in the official files
    task.__dict__["loaded"] = {name: task._set(loaded) for name, loaded in whole.loaded.items()}
    task._groups, task._total = whole._groups, whole._total
    return task


@pytest.fixture(scope="module")
def direct(checkpoint, mmlu, tmp_path_factory):
    """lm-eval by itself: (shots, samples) -> its results."""
    folder = tmp_path_factory.mktemp("tasks")
    listed = shutil.copytree(mmlu, folder / "listed")
    files = [{"split": split, "path": f"{{}}/{split}.jsonl"} for split in ("test", "dev")]
    configs = [
        {
            "config_name": subject,
            "data_files": [{**each, "path": each["path"].format(subject)} for each in files],
        }
        for subject in SUBJECTS
    ]
    (listed / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    member = {
        "group": "mmlu",
        "dataset_path": str(listed),
        "dataset_kwargs": {"cache_dir": str(folder / "arrow")},
    }
    (folder / "local.yaml").write_text(yaml.safe_dump({"group": "mmlu_local", "task": [member]}))
    official = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    manager = TaskManager(include_defaults=False, include_path=[str(official), str(folder)])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=16)

    group = manager.load("mmlu_local")["groups"]["mmlu_local"]

    def run(shots: int, samples: dict[str, list[int]] | None) -> dict:
        for task in group.get_all_tasks():
            task.set_config("num_fewshot", None)  # a 0 of the last call would stay
        return lm_eval.simple_evaluate(
            lm,
            tasks=[group],
            task_manager=manager,
            num_fewshot=shots,
            samples=samples,
            bootstrap_iters=0,
        )

    return run


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_equals_a_direct_run_to_the_item(checkpoint, whole, direct, shots, offline):
    task = like(whole, num_fewshot=shots, limit=57 if shots else None)
    task.check(checkpoint)
    batches = list(task.predict(checkpoint, task.ids()))
    assert len(batches) == 57  # a subject is the grain of resuming
    said = {entry["id"]: entry for batch in batches for entry in batch}
    assert list(said) == task.ids() and len(said) == (57 if shots else 228)
    chosen: dict[str, list[int]] = {}
    for id in said:
        name, _, number = id.rpartition("/")
        chosen.setdefault(name, []).append(int(number))
    theirs = direct(shots, chosen if shots else None)
    assert sum(map(len, theirs["samples"].values())) == len(said)
    for name, samples in theirs["samples"].items():
        for sample in samples:
            ours = said[f"{name}/{sample['doc_id']}"]
            assert ours["doc_hash"] == sample["doc_hash"]
            assert ours["metrics"] == {"acc": sample["acc"]}
            likelihoods = [value for value, _ in sample["filtered_resps"]]
            assert ours["said"] == likelihoods.index(max(likelihoods))
    scored = task.score([said[id] for id in task.ids()])
    values = {score.split: score.value for score in scored.scores}
    assert scored.scores[0].split == "all" and scored.scores[0].n == len(said)
    assert values["all"] == pytest.approx(theirs["results"]["mmlu"]["acc,none"], abs=1e-12)
    for name in ("mmlu_stem", "mmlu_humanities", "mmlu_anatomy", "mmlu_virology"):
        assert values[name] == pytest.approx(theirs["results"][name]["acc,none"], abs=1e-12)
    assert {split for split, _ in eval_results.paired(scored)} == {"all", *task.loaded}
    assert len(values) == 1 + 4 + 57 and 0 < values["all"] < 1
    assert {entry["said"] for entry in said.values()} == {0, 1, 2, 3}
    assert f"mmlu, {shots}-shot, no chat template" in scored.details["protocol"]
    assert scored.items[0]["correct"] is bool(said[task.ids()[0]]["metrics"]["acc"])


def test_the_last_position_alone_gives_the_numbers_of_lm_eval(checkpoint, monkeypatch):
    ours = harness_model(checkpoint, 3)
    theirs = HFLM(ours.model, tokenizer=ours.tokenizer, batch_size=3)
    contexts = [list(range(40, 40 + length)) for length in (5, 9, 2, 9, 7)]
    letters = [("", context, [choice]) for context in contexts for choice in (3, 50, 7, 99)]
    expected = theirs._loglikelihood_tokens(letters, disable_tqdm=True)
    widths = []
    head = ours.model.lm_head.forward
    monkeypatch.setattr(ours.model.lm_head, "forward", lambda x: widths.append(x.ndim) or head(x))
    found = ours._loglikelihood_tokens(letters)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], abs=1e-5)
    assert widths == [2, 2], "contexts by vocabulary, in two batches; positions are no axis"
    longer = [("", context, [3, 50]) for context in contexts]
    longer += [("", [60, *context], [3, 9, 50][:size]) for context in contexts for size in (1, 3)]
    expected = theirs._loglikelihood_tokens(longer, disable_tqdm=True)
    found = ours._loglikelihood_tokens(longer)
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    cut = [("", [60] * (ours.max_length + 5), [3])]
    expected = theirs._loglikelihood_tokens(cut, disable_tqdm=True)
    assert ours._loglikelihood_tokens(cut, disable_tqdm=True) == expected


def test_a_prompt_is_tokenized_once_and_a_template_compiled_once(checkpoint, monkeypatch):
    lm = harness_model(checkpoint, 3)
    texts = []
    encode = lm.tokenizer.encode
    monkeypatch.setattr(lm.tokenizer, "encode", lambda t, **kw: texts.append(t) or encode(t, **kw))
    pairs = [lm._encode_pair("Answer:", f" {letter}") for letter in "ABCD"]
    assert texts.count("Answer:") == 1 and len(texts) == 5
    assert [list(context) for context, _ in pairs] == [encode("Answer:")] * 4
    pairs[0][0].append(1)  # nobody's list is anybody else's
    assert lm.tok_encode("Answer:") == encode("Answer:")
    before = utils.env.from_string
    with compiled_once():
        assert utils.env.from_string("{{a}}") is utils.env.from_string("{{a}}")
    assert utils.env.from_string == before


def test_shots_template_and_data_are_part_of_the_key(whole, tmp_path):
    inputs = like(whole).inputs()
    assert like(whole).inputs() == inputs
    for changes in ({"num_fewshot": 5}, {"apply_chat_template": True}, {"limit": 57}):
        assert like(whole, **changes).inputs() != inputs
    folder = write_task(tmp_path / "tasks")
    before = Harness("sums", include=str(folder)).inputs()
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace('"a": "b"', '"a": "c"'))
    assert Harness("sums", include=str(folder)).inputs()["data"] != before["data"]


def test_a_subject_that_is_missing_is_named(tmp_path):
    for subject in SUBJECTS[1:]:
        (tmp_path / subject).mkdir()
    with pytest.raises(ValueError, match="has 56 of the 57 subjects of MMLU: abstract_algebra"):
        _ = Harness("mmlu", str(tmp_path)).loaded
    (tmp_path / SUBJECTS[0]).mkdir()
    with pytest.raises(ValueError, match=r"cannot be loaded: .*abstract_algebra has no test and"):
        _ = Harness("mmlu", str(tmp_path)).loaded


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_both_kinds_of_files_are_read_and_the_folder_stays_as_it_is(tmp_path, kind):
    folder = write_mmlu(tmp_path / "mmlu", kind, test=1, dev=1)
    before = sorted(path.as_posix() for path in folder.rglob("*"))
    with harness._read_from(folder, True, str(tmp_path / "arrow")):
        rows = harness.datasets.load_dataset("cais/mmlu", "virology")
    assert sorted(path.as_posix() for path in folder.rglob("*")) == before
    assert {split: len(each) for split, each in rows.items()} == {"test": 1, "dev": 1}
    assert rows["test"][0] == question("virology", "test", 0)


def test_wrong_columns_are_named(tmp_path):
    folder = write_mmlu(tmp_path / "mmlu", test=1, dev=1)
    for split in ("test", "dev"):
        row = {**question("anatomy", split, 0)}
        row["options"] = row.pop("choices")
        (folder / f"anatomy/{split}.jsonl").write_text(json.dumps(row) + "\n")
    says = r"cannot be loaded: .*anatomy/test\.jsonl has no column choices; it has answer, options"
    with pytest.raises(ValueError, match=says):
        _ = Harness("mmlu", str(folder)).loaded
    row = question("anatomy", "test", 0)
    (folder / "anatomy/test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*column names don't match"):
        _ = Harness("mmlu", str(folder)).loaded


def write_task(folder: Path, **changes) -> Path:
    """An ordinary lm-eval task over a JSONL file: two metrics, one filter."""
    folder.mkdir()
    rows = [{"q": f"{i} and", "a": "ab"[i % 2]} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "arrow"),
        },
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 2, "do_sample": False, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **changes,
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture
def sums(tmp_path, monkeypatch) -> Path:
    """A task whose prompt is made by code beside a file that it includes from another folder."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "base").write_text("doc_to_text: !function prompts.text\nrepeats: 1\n")
    (other / "prompts.py").write_text(
        "import wording\ndef text(doc):\n    return wording.of(doc)\n"
    )
    (other / "wording.py").write_text("def of(doc):\n    return doc['q']\n")
    monkeypatch.syspath_prepend(other)
    folder = write_task(tmp_path / "tasks")
    text = (folder / "sums.yaml").read_text().replace("doc_to_text:", "include: ../other/base\n#")
    (folder / "sums.yaml").write_text(text)
    yield folder
    sys.modules.pop("wording", None)


def key_of(folder: Path) -> dict:
    """What a new process has in the key: no module is imported yet."""
    harness._manager.cache_clear()
    for name in ("wording", str(folder.parent / "other/prompts")):
        sys.modules.pop(name, None)
    return Harness("sums", include=str(folder)).inputs()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("tasks/sums.yaml", "max_gen_toks: 2", "max_gen_toks: 3"),
        ("tasks/sums.yaml", "metric: exact_match", "ignore_case: true\n  metric: exact_match"),
        ("tasks/sums.yaml", "output_type:", "description: Add.\noutput_type:"),
        (
            "tasks/sums.yaml",
            "output_type:",
            "filter_list: [{name: a, filter: [{function: take_first}]}]\noutput_type:",
        ),
        ("other/base", "repeats: 1", "repeats: 2"),
        ("other/prompts.py", "wording.of(doc)", "'Q: ' + wording.of(doc)"),
        ("other/wording.py", "doc['q']", "'Q: ' + doc['q']"),
    ],
)
def test_whatever_makes_a_prompt_or_a_score_is_part_of_the_key(sums, file, old, new):
    before = key_of(sums)
    assert key_of(sums) == before
    path = sums.parent / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert key_of(sums)["config"] != before["config"]


def test_of_a_checkpoint_in_bf16_no_two_choices_tie(checkpoint, tmp_path):
    """bf16 has steps of 0.125 where logits are 16 to 32, and lm-eval takes the first of equals."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight.data *= 30
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    ours = harness_model(tmp_path, 4)
    assert ours.model.dtype == torch.bfloat16
    every = [("", [40, 41, 42], [choice]) for choice in range(len(ours.tokenizer))]
    logs = [log for log, _ in ours._loglikelihood_tokens(every)]
    assert len({*logs}) == len(logs)
    states = ours.model.model(torch.tensor([[40, 41, 42]])).last_hidden_state[0, -1].float()
    expected = torch.log_softmax(ours.model.lm_head.weight.float() @ states, -1)
    assert logs == pytest.approx(expected.tolist(), abs=1e-4)


def test_any_other_task_by_name(checkpoint, tmp_path, offline):
    task = Harness("sums", include=str(write_task(tmp_path / "tasks")))
    task.check(checkpoint)
    assert task.ids() == [f"sums/{i}" for i in range(6)]
    (batch,) = task.predict(checkpoint, task.ids())
    assert [entry["id"] for entry in batch] == task.ids()
    assert all(entry["metrics"].keys() == {"exact_match"} for entry in batch)
    (score,) = task.score(batch).scores
    assert (score.split, score.metric, score.n) == ("all", "exact_match", 6)
    (rest,) = task.predict(checkpoint, task.ids()[4:])
    assert [(entry["id"], entry["doc_hash"]) for entry in rest] == [
        (entry["id"], entry["doc_hash"]) for entry in batch[4:]
    ]


def test_what_lm_eval_cannot_do_is_said_before_any_work(checkpoint, tmp_path):
    folder = str(write_task(tmp_path / "tasks", num_fewshot=0))
    with pytest.raises(ValueError, match="has no task or group of this name in"):
        Harness("summs", include=folder).check(checkpoint)
    with pytest.raises(ValueError, match="num_fewshot=5: sums fixes it to 0"):
        Harness("sums", include=folder, num_fewshot=5).check(checkpoint)
    with pytest.raises(ValueError, match="data=nowhere is no folder"):
        Harness("mmlu", "nowhere").check(checkpoint)
    metric = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    other = write_task(tmp_path / "other", metric_list=[metric])
    with pytest.raises(ValueError, match="no metric of sums is a mean over items"):
        Harness("sums", include=str(other)).check(checkpoint)
