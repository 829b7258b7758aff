"""Prompts in the layouts of other tokenizers: ids of NeMo's formatters (golden/make_chat_golden.py
made them) and of transformers' templates, speech among them, and what cannot be laid out."""

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from speechfuse.tokens import prompts
from speechfuse.tokens.vocabulary import Vocabulary

GOLDEN = Path(__file__).parent / "golden"
FOUND = json.loads((GOLDEN / "chat.json").read_text("utf-8"))
TEMPLATES = {
    "llama2": (
        "{% set asked = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set asked.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}{{ '<s>[INST] ' + asked.system + m.content + ' [/INST]' }}"
        "{% set asked.system = '' %}{% else %}{{ m.content + ' </s>' }}{% endif %}{% endfor %}"
    ),
    "qwen": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "llama2_chat": (  # of Llama-2-7b-chat-hf itself
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
        "{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "silent": (  # on what it does not know
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    ),
    "question": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\nA:' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    ),
}


def vocabulary(family: str, template: str | None = None) -> Vocabulary:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "chat" / family)
    tokenizer.chat_template = TEMPLATES.get(template or family)
    return Vocabulary(tokenizer, None)


def turns(dialog: list[list[str]], speech: str | None = None) -> list[dict[str, Any]]:
    return [{"role": role, "segments": [{"text": text}]} for role, text in dialog]


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen"])
def test_ids_are_those_of_nemos_formatters(family):
    ours = vocabulary(family)
    for dialog, expected in zip(FOUND["dialogs"], FOUND[family], strict=True):
        dialog = dialog[1:] if family == "qwen" and dialog[0][0] == "system" else dialog
        ids, targets = prompts.render(ours, turns(dialog))
        assert ids == expected
        reply = [id for id, target in zip(ids, targets, strict=True) if target]
        said = [text for role, text in dialog if role == "assistant"]
        shown = ours.tokenizer.decode(reply)
        assert re.sub(r"</s>|<\|eot_id\|>|<\|im_end\|>|\s", "", shown) == re.sub(
            r"\s", "", "".join(said)
        )


@pytest.mark.parametrize(
    ("family", "template"), [("llama2", "zephyr"), ("llama2", "llama2_chat"), ("qwen", "qwen")]
)
def test_ids_are_those_of_transformers_template(family, template):
    ours = vocabulary(family, template)
    for dialog in FOUND["dialogs"]:
        messages = [{"role": role, "content": text} for role, text in dialog]
        for end, generate in ((None, False), (-1, True)):
            expected = ours.tokenizer.apply_chat_template(
                messages[:end], add_generation_prompt=generate, return_dict=False
            )
            ids, _ = prompts.render(ours, turns(dialog[:end]), add_generation_prompt=generate)
            assert ids == expected


def test_a_question_with_speech_and_an_end_string():
    """As Modular SpeechLLM's "Q: {context}\\nA: {answer}", whose end is a token here."""
    ours = vocabulary("llama2", "question")
    segments = [{"text": "what "}, {"speech": {}}, {"text": " now?</s>"}]
    asked = [{"role": "user", "segments": segments}, *turns([["assistant", "yes"]])]
    ids, targets = prompts.render(ours, asked, speech_ids=lambda speech: [-1, -1])
    parts = [ours.text("Q: what "), [-1, -1], ours.text(" now?</s>\nA:"), ours.text(" yes")]
    assert ids == [*chain(*parts), ours.end] and ours.end not in ours.text(" now?</s>")
    assert targets == [i >= len(ids) - len(parts[3]) - 1 for i in range(len(ids))]
    assert (ours.end, ours.end_of_turn, ours.begin) == (301, 301, 300)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no control tokens of Llama 3 and no chat template of its own: put"),
        ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", "ends a reply with no token"),
        (
            "{% for m in messages %}{{ m.role + loop.index|string + m.content + '</s>' }}"
            "{% endfor %}",
            "lays out turns differently by their place",
        ),
    ],
)
def test_a_template_that_cannot_be_laid_out_is_refused(template, message):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "chat/llama2")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        Vocabulary(tokenizer, None)


def test_a_role_that_the_template_has_no_place_for_is_refused():
    ours = vocabulary("llama2", "silent")
    for roles in (["system", "user"], ["user", "user"], ["assistant"]):
        with pytest.raises(ValueError, match="the chat template has no place for"):
            prompts.render(ours, turns([[role, "a"] for role in roles]))
