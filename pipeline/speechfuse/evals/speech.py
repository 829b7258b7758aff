"""Tasks by ear: spoken questions and transcription.

In: a checkpoint and a dataset of speech rows whose `extra` names split, voices and (for questions)
fact and answer. Out: scores and the items behind them. Prompts are rendered by speechfuse.prompts,
decoding is greedy through transformers.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from speechfuse import instructions, prompts, shards
from speechfuse.evals.scores import Score, mean, word_error_rate
from speechfuse.vocab import Vocabulary, check_quantizer


class Listener:
    """A checkpoint that answers turns. ValueError when it was not expanded for quantizer
    `identity`."""

    def __init__(self, checkpoint: Path, identity: str, what: str) -> None:
        check_quantizer(checkpoint, identity, what)
        self.vocabulary = Vocabulary.load(checkpoint)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def reply(
        self, turns: list[list[dict[str, Any]]], max_new_tokens: int, batch_size: int = 64
    ) -> list[str]:
        """The greedy reply to each conversation, in order."""
        ids = [prompts.render(self.vocabulary, t, add_generation_prompt=True)[0] for t in turns]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding in a batch
        replies = [""] * len(ids)
        for start in tqdm(range(0, len(order), batch_size), "listening", unit="batch", leave=False):
            chosen = order[start : start + batch_size]
            longest = max(len(ids[i]) for i in chosen)
            tokens = torch.full((len(chosen), longest), self.vocabulary.end)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(chosen):
                tokens[row, longest - len(ids[i]) :] = torch.tensor(ids[i])
                mask[row, longest - len(ids[i]) :] = 1
            made = self.model.generate(
                tokens.to(self.model.device), attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None,
                eos_token_id=[self.vocabulary.end_of_turn, self.vocabulary.end],
                pad_token_id=self.vocabulary.end,
            )  # fmt: skip
            for i, text in zip(
                chosen,
                self.vocabulary.tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True),
                strict=True,
            ):
                replies[i] = text.strip()
        return replies


def _rows(path: str, kind: str) -> list[dict[str, Any]]:
    rows = []
    for row in shards.read_rows(Path(path)):
        row["extra"] = json.loads(row["extra"])
        if row["extra"]["kind"] == kind:
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows of kind {kind!r}")
    return rows


def _groups(rows: list[dict[str, Any]], splits: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Split name -> indices of the rows whose `extra` matches; a split without rows is left out."""
    found = {
        name: [i for i, row in enumerate(rows) if wanted.items() <= row["extra"].items()]
        for name, wanted in splits.items()
    }
    return {name: indices for name, indices in found.items() if indices}


def _same(reply: str, answer: str) -> bool:
    return " ".join(reply.lower().split()) == " ".join(answer.lower().split())


def spoken_qa(
    checkpoint: Path,
    path: str,
    train: str,
    splits: dict[str, dict[str, Any]],
    transcript_splits: dict[str, dict[str, Any]],
    controls_of: str,
    repeat_first: bool,
    transcribe_request: str,
    max_new_tokens: int = 32,
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Spoken questions: exact answers, what was heard, and two controls.

    `splits`: name -> the `extra` values of its rows. `shuffled_audio` scores the split
    `controls_of` with each question's audio replaced by that of another fact; `majority_answer`
    answers it with the commonest answer of the questions in `train`. Intervals are clustered by
    fact. `repeat_first`: replies hold the transcript, which is then scored; otherwise it is asked
    for separately.
    """
    rows = _rows(path, "question")
    listener = Listener(checkpoint, shards.read_stream(Path(path))["quantizer"], path)
    groups = _groups(rows, splits)
    used = sorted(
        {i for g in (groups, _groups(rows, transcript_splits)) for ids in g.values() for i in ids}
    )
    asked = [instructions.answer(rows[i])[:1] for i in used]
    replies = dict(zip(used, listener.reply(asked, max_new_tokens), strict=True))
    answers = {i: prompts.read_spoken_answer(reply)[1] for i, reply in replies.items()}
    if repeat_first:
        heard = {i: prompts.read_spoken_answer(reply)[0] for i, reply in replies.items()}
    else:
        asked = [instructions.transcribe(rows[i], [transcribe_request])[:1] for i in used]
        heard = dict(zip(used, listener.reply(asked, max_new_tokens), strict=True))

    def accuracy(name: str, given: list[str], indices: list[int]) -> Score:
        facts = [rows[i]["extra"]["fact"] for i in indices]
        right = [
            float(_same(a, rows[i]["extra"]["answer"])) for a, i in zip(given, indices, strict=True)
        ]
        return Score("spoken_qa", name, "acc", *mean(right, facts), len(right))

    scores = [accuracy(name, [answers[i] for i in ids], ids) for name, ids in groups.items()]
    controls = groups[controls_of]
    scores.append(accuracy("shuffled_audio", _shuffled(rows, controls, answers), controls))
    common = Counter(row["extra"]["answer"] for row in _rows(train, "question")).most_common(1)
    scores.append(accuracy("majority_answer", [common[0][0]] * len(controls), controls))
    for name, ids in _groups(rows, transcript_splits).items():
        truth, made = [rows[i]["text"] for i in ids], [heard[i] for i in ids]
        error = word_error_rate(truth, made, [rows[i]["extra"]["fact"] for i in ids])
        scores.append(Score("question_transcript", name, "wer", *error, len(ids)))
    exact = [i for i in controls if _same(heard[i], rows[i]["text"])]
    if exact:
        scores.append(accuracy(f"{controls_of}_heard_exactly", [answers[i] for i in exact], exact))
    items = [
        {
            "id": rows[i]["id"],
            "question": rows[i]["text"],
            "heard": heard[i],
            "answer": answers[i],
            "expected": rows[i]["extra"]["answer"],
            "speaker": rows[i]["speaker"],
            "split": next((name for name, ids in groups.items() if i in ids), None),
            "correct": _same(answers[i], rows[i]["extra"]["answer"]),
        }
        for i in used
    ]
    return scores, items


def _shuffled(rows: list[dict[str, Any]], indices: list[int], answers: dict[int, str]) -> list[str]:
    """The answers given to somebody else's audio: each item gets that of the next item about
    another fact, half the list away."""
    given = []
    for position, i in enumerate(indices):
        step = len(indices) // 2
        while (
            rows[indices[(position + step) % len(indices)]]["extra"]["fact"]
            == rows[i]["extra"]["fact"]
        ):
            step += 1
        given.append(answers[indices[(position + step) % len(indices)]])
    return given


def transcription(
    checkpoint: Path,
    path: str,
    splits: dict[str, dict[str, Any]],
    requests: list[str],
    max_new_tokens: int = 32,
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Transcription of word lists, asked for in words: corpus WER after Whisper's English
    normaliser."""
    rows = _rows(path, "phrase")
    listener = Listener(checkpoint, shards.read_stream(Path(path))["quantizer"], path)
    groups = _groups(rows, splits)
    used = sorted({i for indices in groups.values() for i in indices})
    asked = [instructions.transcribe(rows[i], requests)[:1] for i in used]
    heard = dict(zip(used, listener.reply(asked, max_new_tokens), strict=True))
    scores = [
        Score("transcription", name, "wer",
              *word_error_rate([rows[i]["text"] for i in ids], [heard[i] for i in ids]), len(ids))
        for name, ids in groups.items()
    ]  # fmt: skip
    items = [{"id": rows[i]["id"], "text": rows[i]["text"], "heard": heard[i]} for i in used]
    return scores, items
