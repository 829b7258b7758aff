"""Seconds to the first token of a reply to a spoken question.

In: generators of speechfuse.evals and a waveform in memory. Out: the median of some times one after
the other, with the fastest and the slowest. The audio's encoder, the prompt and the forward pass
are in it; loading is not. Of a cascade all that its recognizer says is in it too.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from speechfuse.tokens import prompts

TIMES = 7
WORDS = 32  # tokens that a recognizer may say


@dataclass(frozen=True)
class Asked:
    """A question: its encoder, a prompt in which {speech} stands for it, and its waveform."""

    encoder: Any
    prompt: str
    waveform: np.ndarray

    def turns(self, generator: Any) -> list[dict[str, Any]]:
        before, _, after = self.prompt.partition("{speech}")
        speech = generator.speech(self.encoder, [self.waveform])
        segments = [{"text": before}, *speech, {"text": after}]
        return [{"role": "user", "segments": [s for s in segments if s.get("text") != ""]}]


def first_token(ears: Any, asked: Asked, base: Any = None) -> tuple[float, float, float]:
    """Return (median, least, most) seconds. With `base` its first token comes after the words that
    `ears` heard."""
    seconds = []
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        (reply,) = ears.reply([asked.turns(ears)], WORDS if base else 1)
        if base:
            heard, _ = prompts.read_spoken_answer(reply)
            base.reply([[{"role": "user", "segments": [{"text": heard}]}]], 1)
        seconds.append(time.perf_counter() - began)
    del seconds[0]  # the first fills caches
    return median(seconds), min(seconds), max(seconds)
