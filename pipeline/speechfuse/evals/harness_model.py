"""lm-eval's model of a checkpoint, without work that it does more than once.

In: a Hugging Face folder. Out: an lm_eval.models.huggingface.HFLM. For multiple choice lm-eval
computes logits at every position of a prompt, 128,256 numbers each in Llama 3, and reads those of
the choices; here only those are computed. It also tokenizes a prompt again for each choice,
and compiles a task's template again for each item. Batches and order are the same, and so are the
numbers of a checkpoint in float32. Of one in bf16 the head and the log-softmax are in float32 here,
where lm-eval's are in bf16, in which choices tie and the first of them wins.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stderr
from functools import cache, cached_property, lru_cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from speechfuse import workers
from speechfuse.evals import generation
from speechfuse.tokens.vocabulary import Vocabulary


class LastPosition(HFLM):
    """An HFLM of a transformers Llama, or of our RWKV."""

    @cached_property
    def _encode(self) -> Callable[..., list[int]]:
        return lru_cache(16)(super().tok_encode)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Return the ids of a text; those of the last few texts are remembered."""
        return list(self._encode(string, *args, **kwargs))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each (name, context, continuation)."""
        asked: dict[tuple[int, ...], list[int]] = {}  # the letters of a question are one input
        for i, (_, context, answer) in enumerate(requests):
            asked.setdefault((*context, *answer[:-1]), []).append(i)
        if any(len(ids) > self.max_length for ids in asked):  # lm-eval cuts those from the left
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        order = sorted(asked, key=lambda ids: (-len(ids), ids))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            read = [max(len(requests[i][2]) for i in asked[ids]) for ids in chunk]
            for ids, logs in zip(chunk, self._last(chunk, read), strict=True):
                best = logs.argmax(-1).tolist()
                for i in asked[ids]:
                    answer = requests[i][2]
                    places = torch.arange(len(logs) - len(answer), len(logs))
                    likelihood = logs[places, torch.tensor(answer)].sum()
                    results[i] = (float(likelihood), best[-len(answer) :] == answer)
        return results

    @torch.inference_mode()
    def _last(self, inputs: list[tuple[int, ...]], read: list[int]) -> list[torch.Tensor]:
        """Return log-probabilities (read, vocabulary) of what follows the last `read` ids of
        each."""
        tokens = pad_sequence([torch.tensor(ids) for ids in inputs], batch_first=True)
        model, tokens = self.model, tokens.to(self.device)
        if hasattr(model, "hidden"):  # ours
            states = model.hidden(tokens)
        else:
            states = model.model(tokens, use_cache=False).last_hidden_state
        rows = zip(states, inputs, read, strict=True)
        last = [row[len(ids) - count : len(ids)] for row, ids, count in rows]
        head = model.get_output_embeddings()
        # in float32: bf16 rounds logits of 16 to 32 to steps of 0.125
        weights = {name: weight.float() for name, weight in head.named_parameters()}
        logits = functional_call(head, weights, torch.cat(last).float())
        return list(torch.log_softmax(logits, -1).cpu().split(read))


def harness_model(checkpoint: Path, batch_size: int, lora: bool = False) -> HFLM:
    """Return lm-eval's model of a checkpoint, with the LoRA beside it added if `lora`, on the
    device of this process."""
    tokenizer = Vocabulary.load(checkpoint).tokenizer
    with redirect_stderr(StringIO()):
        model = generation.load(checkpoint, workers.device(), lora)
        options = {"batch_size": batch_size, "softmax_dtype": "float32"}
        return LastPosition(pretrained=model, tokenizer=tokenizer, **options)


def compiled_once() -> AbstractContextManager[Any]:
    """Return a context in which lm-eval compiles each template once."""
    return patch.object(utils.env, "from_string", cache(utils.env.from_string))
