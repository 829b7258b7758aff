"""Replies of a checkpoint: its model, and decoding in left-padded batches.

In: conversations as turns, rendered by speechfuse.tokens.prompts. Out: replies as text. Which
conversations share a batch follows from their lengths alone, so that decoding which is stopped
between batches and resumed gives the same replies. Decoding is greedy unless a Sampling is set, and
each prompt begins with one <|begin_of_text|>. With `blog` it is that of the evaluation of Llama3-s
v0.2: each prompt begins with two <|begin_of_text|>, control tokens that are written in a text are
encoded as control tokens, and replies are sampled as the checkpoint's generation_config says.
"""

import gc
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from speechfuse import config
from speechfuse.components import Positive
from speechfuse.fusion import folder
from speechfuse.tokens import prompts, weights
from speechfuse.tokens.vocabulary import Vocabulary, check_quantizer, read_speech

VERSION = 1  # is part of a prediction's key: raise it if the same prompt may get another reply
BLOG_SEED = 42
_loaded: dict[Any, Any] = {}  # only the last model: a checkpoint's tasks follow each other


def load(checkpoint: Path, device: str | None = None, lora: bool = False) -> Any:
    """Return the model of a Hugging Face folder, in the dtype that its config.json states, with the
    LoRA or learned state beside it added if `lora`. With `device` None it is on a GPU if there is
    one. The last model is kept until another is asked for, or its files change. Raises as
    weights.headers, and ValueError for weights that are not finite."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    files = sorted(path for path in Path(checkpoint).absolute().rglob("*") if path.is_file())
    stamp = (
        device,
        lora,
        *((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files),
    )
    if stamp not in _loaded:
        weights.headers(checkpoint)
        _loaded.clear()
        gc.collect()  # before the next one comes: two may not fit
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ValueError(f"{checkpoint} is broken: weights of {name} are not finite")
        if lora and (checkpoint / folder.LORA).is_file():
            folder.add_lora(model, checkpoint)
        _loaded[stamp] = model.to(device).eval()
    if lora:
        folder.set_state(_loaded[stamp], checkpoint)
    return _loaded[stamp]


@dataclass(frozen=True)
class Sampling:
    """How replies are made: drawn with a `temperature`, from the `top_k` likeliest tokens and the
    likeliest that make up `top_p`; without one the likeliest token each time. `repetition_penalty`
    above 1 makes less likely what was said, by a model that reads tokens also what it was asked.
    Draws follow from the settings and the batch, so that a run that was stopped goes on alike.
    Raises ValueError for top_k or top_p without a temperature."""

    temperature: Positive | None = None
    top_k: Annotated[int, Ge(0)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    repetition_penalty: Positive | None = None

    def __post_init__(self) -> None:
        if self.temperature is None and (self.top_k, self.top_p) != (None, None):
            raise ValueError(
                "sampling: top_k and top_p need a temperature, without which it is greedy"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' generate."""
        penalty, own = self.repetition_penalty, {"temperature": self.temperature}
        of_reply = {"repetition_penalty": penalty} if penalty else {}
        if self.temperature is None:
            return {"do_sample": False, **own, "top_p": None, **of_reply}
        likeliest = {"top_k": self.top_k or 0, "top_p": self.top_p or 1.0}  # 0 and 1: all of them
        return {"do_sample": True, **own, **likeliest, **of_reply}


def sampling(settings: dict[str, Any] | None) -> Sampling:
    """Return the Sampling that a configuration states. Raises ValueError for what it cannot be."""
    return config.instantiate({"_component_": f"{__name__}.Sampling", **(settings or {})})


class BlogVocabulary(Vocabulary):
    """A vocabulary that encodes control tokens written in a text as control tokens; in training
    they are encoded as plain text."""

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class Generator:
    """A checkpoint that answers conversations.

    `identity`: the quantizer of the speech; None when it is asked in text alone. `what`: the name
    of the speech in the error. Raises ValueError when the checkpoint was not expanded for that
    quantizer.
    """

    sampling = Sampling()

    def __init__(
        self,
        checkpoint: Path,
        identity: str | None,
        what: str,
        device: str | None = None,
        blog: bool = False,
    ) -> None:
        if identity is not None:
            check_quantizer(checkpoint, identity, what)
        self.vocabulary = (BlogVocabulary if blog else Vocabulary).load(checkpoint)
        self.blog = blog
        self._load(checkpoint, device)

    def _load(self, checkpoint: Path, device: str | None) -> None:
        self.model = load(checkpoint, device)

    def speech(self, quantizer: Any, waveforms: list[np.ndarray]) -> list[dict[str, Any]]:
        """Return the segments of turns that hold `waveforms`."""
        return [{"speech": {"codes": codes}} for codes in quantizer.encode(waveforms)]

    def prompt(self, turns: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a conversation that is to be answered."""
        ids, _ = prompts.render(self.vocabulary, turns, add_generation_prompt=True)
        return [self.vocabulary.begin] * self.blog + ids

    def inputs(self, tokens: torch.Tensor, ids: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return the arguments of transformers' generate for `tokens` (prompts, length), in which
        `ids` are padded on the left."""
        return {"inputs": tokens}

    def reply(
        self, turns: list[list[dict[str, Any]]], max_new_tokens: int, batch_size: int = 64
    ) -> list[str]:
        """Return the reply to each conversation, in order."""
        asked = {str(i): conversation for i, conversation in enumerate(turns)}
        batches = self.replies(asked, list(asked), max_new_tokens, batch_size)
        replies = {entry["id"]: entry["reply"] for batch in batches for entry in batch}
        return [replies[id] for id in asked]

    def replies(
        self,
        asked: dict[str, list[dict[str, Any]]],
        todo: list[str],
        max_new_tokens: int,
        batch_size: int = 64,
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of {id, reply, tokens, capped} for the conversations `todo` of `asked`,
        shortest first. `tokens` is the length of the reply without its end token; `capped` says
        that no end token came within `max_new_tokens`."""
        ids = {id: self.prompt(turns) for id, turns in asked.items()}
        unanswered = set(todo)
        order = sorted(ids, key=lambda id: len(ids[id]))  # little padding in a batch
        for start in range(0, len(order), batch_size):
            chosen = [id for id in order[start : start + batch_size] if id in unanswered]
            if chosen:
                torch.manual_seed(BLOG_SEED + start)
                replies = self._generate([ids[id] for id in chosen], max_new_tokens)
                yield [{"id": id, **reply} for id, reply in zip(chosen, replies, strict=True)]

    @torch.inference_mode()
    def _generate(self, ids: list[list[int]], max_new_tokens: int) -> list[dict[str, Any]]:
        """Return {reply, tokens, capped} for each prompt of one batch."""
        prompts_ids = [torch.tensor(prompt) for prompt in ids]
        tokens = pad_sequence(prompts_ids, True, self.vocabulary.end, "left")
        mask = pad_sequence([torch.ones_like(each) for each in prompts_ids], True, 0, "left")
        as_blog = self.blog and self.sampling == Sampling()
        how = {} if as_blog else self.sampling.arguments()
        ends = [self.vocabulary.end_of_turn, self.vocabulary.end]
        inputs = self.inputs(tokens.to(self.model.device), ids)
        replies = self.model.generate(
            **inputs,
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=self.vocabulary.end,
            **how,
        )
        if "inputs" in inputs:  # else the reply alone comes back
            replies = replies[:, tokens.shape[1] :]
        texts = self.vocabulary.tokenizer.batch_decode(replies, skip_special_tokens=True)
        lengths = [
            next((i for i, token in enumerate(reply) if token in ends), len(reply))
            for reply in replies.tolist()
        ]
        return [
            {"reply": text.strip(), "tokens": length, "capped": length == max_new_tokens}
            for text, length in zip(texts, lengths, strict=True)
        ]


def generator(checkpoint: Path, *arguments: Any) -> Any:
    """Return a `Generator` of a checkpoint, or an instance of the class whose dotted path
    speech.json, or config.json in its block "speechfuse", names as `generator`; it has the same
    methods. Raises ValueError for a class of another package: a checkpoint may come from anywhere,
    and may not name code to be run."""
    block = read_speech(checkpoint) or {}
    dotted = block.get("generator", f"{__name__}.Generator")
    if not dotted.startswith("speechfuse."):
        raise ValueError(f"{checkpoint}: it names generator {dotted}, which is not ours")
    return config.resolve(dotted)(checkpoint, *arguments)


REFUSAL = re.compile(
    r"\W*((i'?m|i am) (sorry|afraid|unable|not able)|sorry|i can(no|')t|as an ai\b|unfortunately)",
    re.IGNORECASE,
)


def of_replies(replies: list[str], capped: Iterable[bool]) -> dict[str, Any]:
    """Return {empty, loops, refusals, mean_words}. A loop is a reply without an end (`capped`), or
    one that says a group of three words five times."""
    words = [reply.split() for reply in replies]
    loops = [end or _repeats(each) for end, each in zip(capped, words, strict=True)]
    return {
        "empty": sum(not each for each in words),
        "loops": sum(loops),
        "refusals": sum(bool(REFUSAL.match(reply)) for reply in replies),
        "mean_words": sum(map(len, words)) / len(words),
    }


def _repeats(words: list[str]) -> bool:
    groups = list(zip(words, words[1:], words[2:], strict=False))
    return any(groups.count(group) >= 5 for group in set(groups))
