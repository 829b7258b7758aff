"""lm-eval's model of a checkpoint, without work that it does more than once.

In: a Hugging Face folder. Out: an lm_eval.models.huggingface.HFLM. For multiple choice by letters
lm-eval computes logits at every position of a prompt, 128,256 numbers each in Llama 3, and reads
those of the last; here only those are computed. It also tokenizes a prompt again for each choice,
and compiles a task's template again for each item. Batches, order and numbers are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM

from speechfuse import workers
from speechfuse.evals import decoding
from speechfuse.vocab import Vocabulary


class LastPosition(HFLM):
    """An HFLM of a transformers Llama."""

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Ids of a text; those of the last few texts are remembered."""
        known = self.__dict__.setdefault("_known", {})
        key = (string, args, tuple(sorted(kwargs.items())))
        if key not in known:
            if len(known) >= 16:
                known.clear()
            known[key] = super().tok_encode(string, *args, **kwargs)
        return list(known[key])

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each (name, context, continuation)."""
        longest = max((len(context) for _, context, _ in requests), default=0)
        if longest > self.max_length or any(len(answer) != 1 for _, _, answer in requests):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        asked: dict[tuple[int, ...], list[int]] = {}  # four choices, one context
        for i, (_, ids, _) in enumerate(requests):
            asked.setdefault(tuple(ids), []).append(i)
        order = sorted(asked, key=lambda context: (-len(context), context))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            logs = self._last(chunk)
            for row, context in enumerate(chunk):
                tokens = [requests[i][2][0] for i in asked[context]]
                best = int(logs[row].argmax())
                for i, token, log in zip(
                    asked[context], tokens, logs[row, tokens].tolist(), strict=True
                ):
                    found[i] = (log, token == best)
        return found

    @torch.inference_mode()
    def _last(self, contexts: list[tuple[int, ...]]) -> torch.Tensor:
        """Log-probabilities (contexts, vocabulary) of what follows each context."""
        tokens = torch.zeros(len(contexts), max(map(len, contexts)), dtype=torch.long)
        for row, context in enumerate(contexts):
            tokens[row, : len(context)] = torch.tensor(context)
        ends = torch.tensor([len(context) - 1 for context in contexts], device=self.device)
        states = self.model.model(tokens.to(self.device), use_cache=False).last_hidden_state
        rows = torch.arange(len(contexts), device=self.device)
        logits = self.model.lm_head(states[rows, ends])
        return torch.log_softmax(logits, -1, dtype=self.softmax_dtype).cpu()


def harness_model(checkpoint: Path, batch_size: int) -> HFLM:
    """lm-eval's model of a checkpoint, on the device of this process."""
    tokenizer = Vocabulary.load(checkpoint).tokenizer
    with redirect_stderr(StringIO()):
        model = decoding.load(checkpoint, workers.device())
        return LastPosition(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def compiled_once() -> Iterator[None]:
    """Inside, lm-eval compiles each template once."""
    compile_template = utils.env.from_string
    utils.env.from_string = cache(compile_template)
    try:
        yield
    finally:
        utils.env.from_string = compile_template
