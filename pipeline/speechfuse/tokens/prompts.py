"""The one prompt builder, for training, evaluation and serving.

In: turns, each {role, segments: [{text} | {speech: {codes}}]}, in the schema of
shards.CONVERSATIONS. Out: token ids in Llama-3's chat format, with a mask of the ids that are
targets. Codes become sound tokens here and nowhere earlier.
"""

import random
import re
from collections.abc import Callable
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it brings transformers, and spoken_answer needs none
    from speechfuse.tokens.vocabulary import Vocabulary


def render(
    vocabulary: "Vocabulary",
    turns: list[dict[str, Any]],
    add_generation_prompt: bool = False,
    speech_ids: Callable[[dict[str, Any]], list[int]] | None = None,
    draw: str | None = None,
) -> tuple[list[int], list[bool]]:
    """Turns -> (token ids, target mask), both of one length. Targets are an assistant's text and
    its end-of-turn token.

    `speech_ids` makes the ids of a speech segment {codes, ...}; by default sound tokens, as
    Vocabulary.sound. Text and speech keep their order inside a turn. Of a turn with `either` (lists
    of alternative segments) a list and one of its alternatives are drawn by the seed `draw`;
    without one it is the longest, so that no draw has more ids. With `add_generation_prompt`
    the ids end with the header of an assistant's turn. The layout is Llama-3's, with no system
    message unless it is a turn, or for another tokenizer that of its chat template.
    """
    to_ids = speech_ids or (lambda speech: vocabulary.sound(speech["codes"]))
    if vocabulary.chat:
        return _by_template(vocabulary, turns, to_ids, draw)
    ids, targets = [vocabulary.begin], [False]
    for turn in turns:
        body: list[int] = []
        for segment in _segments(vocabulary, turn, draw):
            if segment.get("speech") is not None:
                body += to_ids(segment["speech"])
            else:
                body += vocabulary.text(segment["text"])
        header = vocabulary.header(turn["role"])
        body.append(vocabulary.end_of_turn)
        ids += header + body
        targets += [False] * len(header) + [turn["role"] == "assistant"] * len(body)
    if add_generation_prompt:
        header = vocabulary.header("assistant")
        ids += header
        targets += [False] * len(header)
    return ids, targets


def _by_template(
    vocabulary: "Vocabulary",
    turns: list[dict[str, Any]],
    to_ids: Callable[[dict[str, Any]], list[int]],
    draw: str | None,
) -> tuple[list[int], list[bool]]:
    """The text of a turn is encoded together with what the template puts around it, as far as no
    control token and no speech is between; a turn of a user ends where the reply begins."""
    ids: list[int] = []
    targets: list[bool] = []
    before, pieces = None, list[int | str]()
    for turn in turns:
        opened, closed = vocabulary.chat.around(turn["role"], before)  # type: ignore[union-attr]
        pieces += opened
        for segment in _segments(vocabulary, turn, draw):
            speech = segment.get("speech")
            pieces += [segment["text"]] if speech is None else to_ids(speech)
        pieces += closed
        before = turn["role"]
        if before == "system":  # the user's text goes on where it ends
            continue
        for is_text, group in groupby(pieces, lambda each: isinstance(each, str)):
            part = [*group]
            ids += vocabulary.text("".join(map(str, part))) if is_text else map(int, part)
        pieces = []
        targets += [before == "assistant"] * (len(ids) - len(targets))
    return ids, targets


def _segments(
    vocabulary: "Vocabulary", turn: dict[str, Any], draw: str | None
) -> list[dict[str, Any]]:
    if not (either := turn.get("either")):
        return turn["segments"]
    if draw is not None:
        chance = random.Random(draw)
        return chance.choice(chance.choice(either))

    def length(segments: list[dict[str, Any]]) -> int:
        return sum(len(vocabulary.text(each["text"])) for each in segments if "text" in each)

    every = [*chain.from_iterable(either)]
    return max(every, key=length) if len(every) > 1 else every[0]


def render_sound(vocabulary: "Vocabulary", codes: list[int]) -> tuple[list[int], list[bool]]:
    """The stage 1 sample: begin, sound_start, codes, sound_end, end_of_text; every id but the first
    a target.

    Source: the torchtune fork of Llama3-s, torchtune/datasets/_sound_completion.py.
    """
    ids = [vocabulary.begin, *vocabulary.sound(codes), vocabulary.end]
    return ids, [False] + [True] * (len(ids) - 1)


def spoken_answer(transcript: str, answer: str) -> str:
    """Return a target that repeats the question first: its transcript on one line, then the answer,
    which may have several."""
    return f"{' '.join(transcript.splitlines())}\n{answer}"


def read_spoken_answer(text: str) -> tuple[str, str]:
    """Split a reply in the form of `spoken_answer` into (transcript, answer). A reply of one line
    is an answer without a transcript."""
    transcript, line, answer = text.strip().partition("\n")
    return (transcript.strip(), answer.strip()) if line else ("", transcript.strip())


def read_form(text: str, forms: dict[str, str]) -> tuple[str, str]:
    """Return a reply, and the name of the first of `forms` {name: regular expression} that is found
    in it; "" where none is."""
    return text, next((name for name, form in forms.items() if re.search(form, text)), "")
