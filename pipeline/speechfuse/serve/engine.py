"""A checkpoint that answers many conversations at once, by continuous batching.

In: prompts as a Generator makes them, of tokens or of frames. Out: token ids, each as soon as it is
chosen. A thread takes one step of all rows at a time; a prompt joins between two steps, read alone
as `just ask` reads it, and a row that has ended leaves room for the next.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from speechfuse.serve.protocol import Chat

Memory = list[tuple[Tensor, ...]]  # of each layer; keys and values, or the states of an RWKV


class Asked:
    """A prompt. `told` is called in the engine's thread with each token of the reply, then with
    "stop" or "length", or with the error that ended it. Who wants no more sets `cancelled`. `began`
    and `first`: time.perf_counter() when its turn came, and at its first token."""

    def __init__(self, ids: list[int], chat: Chat, told: Callable[[Any], Any]) -> None:
        self.ids, self.chat, self.told = ids, chat, told
        self.tokens: list[int] = []
        self.cancelled, self.began, self.first = False, 0.0, 0.0
        self._random = torch.Generator()
        self._random.manual_seed(self._random.seed() if chat.seed is None else chat.seed)

    @property
    def length(self) -> int:
        """Return the number of its tokens that the model has read."""
        return len(self.ids) + len(self.tokens) - 1

    def choose(self, logits: Tensor) -> int:
        """Return the next token, of `logits` (vocabulary,)."""
        if not self.chat.temperature:
            return int(logits.argmax())
        shares = (logits.float().cpu() / self.chat.temperature).softmax(-1).sort(descending=True)
        likely = shares.values * (shares.values.cumsum(-1) - shares.values < self.chat.top_p)
        return int(shares.indices[torch.multinomial(likely, 1, generator=self._random)])


class Engine:
    """`rows`: prompts that are answered at once; others wait for their turn, in order."""

    def __init__(self, generator: Any, rows: int) -> None:
        self.generator, self.rows = generator, rows
        self._ends = generator.vocabulary.end_of_turn, generator.vocabulary.end
        self._states = getattr(generator.model, "_is_stateful", False)  # RWKV: of no length
        self._waiting: deque[Asked] = deque()
        self._asked: list[Asked] = []
        self._memory: Memory = []
        self._lock, self.busy = threading.Lock(), False

    def ask(self, asked: Asked) -> None:
        """Answer in a thread, which runs as long as there is what to answer."""
        with self._lock:
            self._waiting.append(asked)
            if not self.busy:
                self.busy = True
                threading.Thread(target=self._run, daemon=True).start()

    @torch.inference_mode()
    def _run(self) -> None:
        while self._goes_on():
            new = None
            try:
                if self._waiting and len(self._asked) < self.rows:
                    new = self._waiting.popleft()
                    self._begin(new)
                else:
                    self._step()
            except Exception as error:  # out of memory: these end, the next are answered
                for asked in {*self._asked, *([new] if new else [])}:
                    asked.told(error)
                self._asked, self._memory = [], []

    def _goes_on(self) -> bool:
        with self._lock:
            self.busy = bool(self._asked or self._waiting)
            return self.busy

    def _begin(self, new: Asked) -> None:
        new.began = time.perf_counter()
        if new.cancelled:
            return
        device = self.generator.model.device
        inputs = self.generator.inputs(torch.tensor([new.ids], device=device), [new.ids])
        if "inputs" in inputs:
            inputs = {"input_ids": inputs["inputs"]}
        logits, memory = self._forward(**inputs, logits_to_keep=1)
        if self._ended(new, logits[0]):
            return
        if self._asked:
            layers = zip(self._memory, memory, strict=True)
            memory = [tuple(map(self._joined, *layer)) for layer in layers]
        self._asked.append(new)
        self._memory = memory

    def _step(self) -> None:
        device = self.generator.model.device
        last = torch.tensor([[asked.tokens[-1]] for asked in self._asked], device=device)
        more: dict[str, Any] = {"state": self._memory}
        if not self._states:
            places = torch.tensor([[asked.length] for asked in self._asked], device=device)
            longest = places.max()
            mask = torch.arange(int(longest) + 1, device=device) >= longest - places
            more = {"past_key_values": DynamicCache(self._memory), "position_ids": places}
            more["attention_mask"] = mask.long()
        logits, self._memory = self._forward(input_ids=last, **more)
        rows = zip(self._asked, logits, strict=True)
        kept = [row for row, (asked, own) in enumerate(rows) if not self._ended(asked, own)]
        if len(kept) < len(self._asked):
            self._asked = [self._asked[row] for row in kept]
            self._memory = [tuple(self._kept(x, kept) for x in layer) for layer in self._memory]

    def _forward(self, **inputs: Any) -> tuple[Tensor, Memory]:
        """Return the last logits (rows, vocabulary), and what is remembered behind them."""
        output = self.generator.model(**inputs, use_cache=True)
        if self._states:
            return output.logits[:, -1], output.state
        return output.logits[:, -1], [(x.keys, x.values) for x in output.past_key_values.layers]

    def _ended(self, asked: Asked, logits: Tensor) -> bool:
        """Choose the next token of a row and tell it. Return whether the row has ended."""
        if asked.cancelled:
            return True
        token = asked.choose(logits)
        asked.first = asked.first or time.perf_counter()
        end = "stop" if token in self._ends else None
        if not end:
            asked.tokens.append(token)
            asked.told(token)
            end = "length" if len(asked.tokens) == asked.chat.most else None
        if end:
            asked.told(end)
        return end is not None

    def _joined(self, rows: Tensor, row: Tensor) -> Tensor:
        """Return both; keys and values (rows, heads, length, width) are padded on the left."""
        if not self._states:
            longest = max(rows.shape[-2], row.shape[-2])
            rows, row = (F.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in (rows, row))
        return torch.cat([rows, row])

    def _kept(self, rows: Tensor, kept: list[int]) -> Tensor:
        """Return some rows, without padding that they all have."""
        longest = max((asked.length for asked in self._asked), default=0)
        return rows[kept] if self._states else rows[kept, :, -longest:]
