"""The prompt builder, pinned to golden ids: what training, evaluation and serving show the model.

The tokenizer here has one token a byte, in the order of GPT-2's byte alphabet, so that every id can
be told without it.
"""

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechfuse.samples import instructions
from speechfuse.tokens import prompts
from speechfuse.tokens.expansion import add_sound_tokens
from speechfuse.tokens.vocabulary import CHAT_TEMPLATE, SoundLayout, Vocabulary
from tests.demo_code import demo

init_base = demo("init_base")

CODES = 16
CONTROL = {
    "<|begin_of_text|>": 256,
    "<|end_of_text|>": 257,
    "<|start_header_id|>": 259,
    "<|end_header_id|>": 260,
    "<|eot_id|>": 262,
    "<|sound_start|>": 263,
    "<|sound_end|>": 264,
} | {f"<|sound_{code:04d}|>": 265 + code for code in range(CODES + 1)}
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
SPOKEN = "<|sound_start|><|sound_0003|><|sound_0000|><|sound_0016|><|sound_end|>"  # codes 3, 0, 16
SPOKEN_TWO = "<|sound_start|><|sound_0007|><|sound_end|>"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = init_base.train_tokenizer(["no merge fits into 256"], vocab_size=256)
    add_sound_tokens(tokenizer, CODES)
    return Vocabulary(tokenizer, SoundLayout(263, 264, 265, CODES, "q"))


def byte_id(byte: int) -> int:
    """Printable bytes come first, in order, then the others: GPT-2's bytes_to_unicode, sorted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return (printable + rest).index(byte)


def golden(text: str) -> list[int]:
    """Ids of a rendered text, from the tables above and not from the tokenizer."""
    ids = []
    for part in re.split(r"(<\|.*?\|>)", text):
        ids += [CONTROL[part]] if part in CONTROL else [byte_id(b) for b in part.encode()]
    return ids


def said(ids: list[int], targets: list[bool]) -> list[list[int]]:
    """The runs of targets."""
    runs: list[list[int]] = []
    for i, (id, target) in enumerate(zip(ids, targets, strict=True)):
        if target and (i == 0 or not targets[i - 1]):
            runs.append([])
        if target:
            runs[-1].append(id)
    return runs


def row(codes: list[int], text: str = "what is 1", **extra: Any) -> dict[str, Any]:
    """A speech row as `datasets` gives it to `instructions`."""
    codes_read = np.array(codes, np.uint16)
    return {"id": "q7", "codes": codes_read, "seconds": 0.12, "text": text, "extra": extra}


def turn(role: str, *segments: str | list[int]) -> dict[str, Any]:
    return {
        "role": role,
        "segments": [{"text": s} if isinstance(s, str) else {"speech": row(s)} for s in segments],
    }


HEARD = [3, 0, 16]
SAMPLES: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    "answer": (
        instructions.answer(row(HEARD, answer="four")),
        f"{USER}{SPOKEN}<|eot_id|>{ASSISTANT}four<|eot_id|>",
        ["four<|eot_id|>"],
    ),
    "answer, repeated first": (
        instructions.answer(row(HEARD, answer="four"), repeat_first=True),
        f"{USER}{SPOKEN}<|eot_id|>{ASSISTANT}what is 1\nfour<|eot_id|>",
        ["what is 1\nfour<|eot_id|>"],
    ),
    "transcription": (
        instructions.transcribe(row(HEARD), requests=["repeat:"]),
        f"{USER}repeat:{SPOKEN}<|eot_id|>{ASSISTANT}what is 1<|eot_id|>",
        ["what is 1<|eot_id|>"],
    ),
    "what is to be done is not said": (
        instructions.transcribe(row(HEARD)),
        f"{USER}{SPOKEN}<|eot_id|>{ASSISTANT}what is 1<|eot_id|>",
        ["what is 1<|eot_id|>"],
    ),
    "number of words": (
        instructions.count_words(row(HEARD)),
        f"{USER}{SPOKEN}<|eot_id|>{ASSISTANT}three<|eot_id|>",
        ["three<|eot_id|>"],
    ),
    "speech in the second turn": (
        [
            turn("user", "hi"),
            turn("assistant", "yes?"),
            turn("user", HEARD),
            turn("assistant", "ok"),
        ],
        f"{USER}hi<|eot_id|>{ASSISTANT}yes?<|eot_id|>{USER}{SPOKEN}<|eot_id|>{ASSISTANT}ok<|eot_id|>",
        ["yes?<|eot_id|>", "ok<|eot_id|>"],
    ),
    "speech in both turns": (
        [
            turn("user", HEARD),
            turn("assistant", "yes?"),
            turn("user", [7]),
            turn("assistant", "ok"),
        ],
        f"{USER}{SPOKEN}<|eot_id|>{ASSISTANT}yes?<|eot_id|>{USER}{SPOKEN_TWO}<|eot_id|>"
        f"{ASSISTANT}ok<|eot_id|>",
        ["yes?<|eot_id|>", "ok<|eot_id|>"],
    ),
    "text before, between and after speech": (
        [turn("user", "a ", HEARD, " b ", [7], " c"), turn("assistant", "d")],
        f"{USER}a {SPOKEN} b {SPOKEN_TWO} c<|eot_id|>{ASSISTANT}d<|eot_id|>",
        ["d<|eot_id|>"],
    ),
    "an assistant who speaks": (
        [turn("user", "say it"), turn("assistant", "so: ", [7])],
        f"{USER}say it<|eot_id|>{ASSISTANT}so: {SPOKEN_TWO}<|eot_id|>",
        [f"so: {SPOKEN_TWO}<|eot_id|>"],
    ),
    "text alone, not ASCII": (
        [turn("user", "o\u00f9?\n"), turn("assistant", "l\u00e0")],
        f"{USER}o\u00f9?\n<|eot_id|>{ASSISTANT}l\u00e0<|eot_id|>",
        ["l\u00e0<|eot_id|>"],
    ),
}


def test_one_sample_id_by_id(vocabulary):
    ids, targets = prompts.render(vocabulary, SAMPLES["answer"][0])
    assert ids == [
        256,
        259,
        84,
        82,
        68,
        81,
        260,
        198,
        198,
        263,
        268,
        265,
        281,
        264,
        262,
        259,
        64,
        82,
        82,
        72,
        82,
        83,
        64,
        77,
        83,
        260,
        198,
        198,
        69,
        78,
        84,
        81,
        262,
    ]
    assert targets == [False] * 28 + [True] * 5


@pytest.mark.parametrize("kind", SAMPLES)
def test_golden_ids_text_and_targets(vocabulary, kind):
    turns, text, replies = SAMPLES[kind]
    ids, targets = prompts.render(vocabulary, turns)
    assert vocabulary.tokenizer.decode(ids) == f"<|begin_of_text|>{text}"
    assert ids == golden(f"<|begin_of_text|>{text}")
    assert said(ids, targets) == [golden(reply) for reply in replies]


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_generation_prompt_is_what_training_showed_before_each_reply(vocabulary, kind):
    turns = SAMPLES[kind][0]
    whole, targets = prompts.render(vocabulary, turns)
    replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert replies
    for i in replies:
        ids, before = prompts.render(vocabulary, turns[:i], add_generation_prompt=True)
        assert whole[: len(ids)] == ids and targets[: len(ids)] == before
        assert targets[len(ids)] and not targets[len(ids) - 1]  # the reply starts right behind it


def test_stage_1_is_the_sound_alone_and_all_of_it_is_a_target(vocabulary):
    ids, targets = prompts.render_sound(vocabulary, row(HEARD)["codes"])
    assert ids == [256, 263, 268, 265, 281, 264, 257]
    assert vocabulary.tokenizer.decode(ids) == f"<|begin_of_text|>{SPOKEN}<|end_of_text|>"
    assert targets == [False, True, True, True, True, True, True]


def test_a_request_is_one_of_the_words_and_the_rows_own(vocabulary):
    requests = ["repeat:", "write down:", "what did I say?"]
    rows = [{**row(HEARD), "id": f"q{i}"} for i in range(60)]
    found = [instructions.transcribe(r, requests)[0]["segments"][0]["text"] for r in rows]
    assert set(found) == set(requests)
    random.seed(5)
    assert found == [instructions.transcribe(r, requests)[0]["segments"][0]["text"] for r in rows]
    turns = instructions.transcribe(rows[0], requests)
    assert vocabulary.tokenizer.decode(prompts.render(vocabulary, turns)[0]) == (
        f"<|begin_of_text|>{USER}{found[0]}{SPOKEN}<|eot_id|>{ASSISTANT}what is 1<|eot_id|>"
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("generate", [False, True])
def test_pure_text_is_rendered_as_the_chat_template_does(vocabulary, merged, generate):
    texts = [
        "what is three plus four",
        "seven",
        "name the capital of france",
        " leading space",
        "a\nb\n\nc",
        "where does a bee live?",
        "12345 \u00e9 \u65e5\u672c <|eot_id",
        "trailing break\n",
        "x",
    ]
    if merged:  # with merges, which must not cross what a header ends with
        tokenizer = init_base.train_tokenizer([*texts, "user assistant\n\n"] * 10, vocab_size=330)
        assert len(tokenizer) == 337
        vocabulary = Vocabulary(tokenizer, None)
    assert vocabulary.tokenizer.chat_template == CHAT_TEMPLATE
    conversations = [[turn("user", a), turn("assistant", b)] for a in texts for b in texts]
    conversations += [c + d for c, d in pairwise(conversations)]
    for turns in conversations:
        messages = [{"role": t["role"], "content": t["segments"][0]["text"]} for t in turns]
        expected = vocabulary.tokenizer.apply_chat_template(
            messages, add_generation_prompt=generate, return_dict=False
        )
        assert prompts.render(vocabulary, turns, add_generation_prompt=generate)[0] == expected


@pytest.mark.parametrize(
    "text", ["<|eot_id|>", f"a<|eot_id|>{ASSISTANT}b", SPOKEN, "<|end_of_text|>"]
)
def test_control_tokens_inside_a_text_stay_text(vocabulary, text):
    plain = prompts.render(vocabulary, [turn("user", "a"), turn("assistant", "b")])[0]
    ids, _ = prompts.render(vocabulary, [turn("user", text), turn("assistant", text)])
    assert [i for i in ids if i > 255] == [i for i in plain if i > 255]
    assert vocabulary.tokenizer.decode(ids).count(text) >= 2


def test_a_spoken_answer_is_read_as_it_was_written():
    texts = ["what is 1", "", "a b c", "", "Three steps:\n1. boil\n2. eat"]
    for transcript in texts[:3:2]:
        for answer in texts:
            written = prompts.spoken_answer(transcript, answer)
            if answer:
                assert prompts.read_spoken_answer(written) == (transcript, answer)
                assert prompts.read_spoken_answer(f"  {written}\n") == (transcript, answer)
    assert prompts.read_spoken_answer("seven") == ("", "seven")
    assert prompts.read_spoken_answer("") == ("", "")
    two_lines = prompts.spoken_answer("how do I\nboil an egg\n", "in water\nhot")
    assert prompts.read_spoken_answer(two_lines) == ("how do I boil an egg", "in water\nhot")


def test_what_the_model_learns_to_say_is_what_is_read_back(vocabulary):
    turns = instructions.answer(row(HEARD, text="what is one", answer="two"), repeat_first=True)
    ids, targets = prompts.render(vocabulary, turns)
    (reply,) = said(ids, targets)
    text = vocabulary.tokenizer.decode(reply, skip_special_tokens=True)  # as the listener decodes
    assert prompts.read_spoken_answer(text) == ("what is one", "two")


def test_a_context_of_the_row_is_its_prompt_where_asked_for():
    asked = row(HEARD, answer="two", context="Answer.")
    (user, _) = instructions.answer(asked, prompt="{context} ")
    assert [segment.get("text") for segment in user["segments"]] == ["Answer. ", None]
    for context in ("", None):  # as many of NeMo's lines have it
        (user, _) = instructions.answer(
            row(HEARD, answer="two", context=context), prompt="{context}\n"
        )
        assert len(user["segments"]) == 1
    with pytest.raises(ValueError, match="no 'context' in extra, which prompt asks for"):
        instructions.answer(row(HEARD, answer="two"), prompt="{context} ")


def test_a_row_of_nemo_has_its_question_and_its_answer_where_they_stand():
    def shown(**extra: str) -> list[Any]:
        user, reply = instructions.context(row(HEARD, **extra), default="mean?")
        ((segments,),) = user["either"]
        return [each.get("text", "*") for each in segments] + [reply["segments"][0]["text"]]

    assert shown(question="Which?", answer="two") == ["*", "Which?", "two"]
    assert shown(question="Which?", context="Why <audio>?") == ["Why ", "*", "?", "what is 1"]
    assert shown(context="<audio> Why?") == ["*", " Why?", "what is 1"]
    assert shown(context="") == ["*", "mean?", "what is 1"]
    with pytest.raises(
        ValueError, match="q7: 'a <audio> b <audio>' has places <audio>: 2, and its"
    ):
        shown(context="a <audio> b <audio>")


def test_a_row_without_text_is_no_target():
    """A piece of a long recording has no transcript: the word None must not be taught."""
    silent = {**row(HEARD, answer="four"), "text": None}
    for make in (
        lambda: instructions.answer(silent, repeat_first=True),
        lambda: instructions.transcribe(silent, ["repeat:"]),
        lambda: instructions.count_words(silent),
    ):
        with pytest.raises(ValueError, match="q7"):
            make()


def test_codes_that_the_checkpoint_lacks_are_refused(vocabulary):
    with pytest.raises(ValueError, match="code 17 is out of range"):
        prompts.render(vocabulary, [turn("user", [17])])


def test_the_shipped_base_model_has_the_chat_template_of_training():
    shipped = Path(__file__).parent.parent / "recipes/demo/models/base"
    loaded = Vocabulary.load(shipped)
    messages = [{"role": "user", "content": "what is three plus four"}]
    expected = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    turns = [turn("user", "what is three plus four")]
    assert prompts.render(loaded, turns, add_generation_prompt=True)[0] == expected


def test_how_speech_becomes_ids_can_be_chosen(vocabulary):
    turns = [turn("user", "a", [16]), turn("assistant", "b")]
    usual, targets = prompts.render(vocabulary, turns)
    sound = vocabulary.sound([16])
    at = next(i for i in range(len(usual)) if usual[i : i + len(sound)] == sound)
    other, _ = prompts.render(vocabulary, turns, speech_ids=lambda speech: [1, *speech["codes"]])
    assert other == [*usual[:at], 1, 16, *usual[at + len(sound) :]]
    assert len(targets) == len(usual)
