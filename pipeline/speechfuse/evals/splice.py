"""Replies of a checkpoint whose speech comes in as frames.

In: conversations as turns, whose speech segments have `frames`. Out: replies, as Generator's. The
language model is that of the folder, with its LoRA added and its embedding replaced by the door.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from speechfuse.evals import generation
from speechfuse.fusion import folder
from speechfuse.fusion.door import FRAME, Door
from speechfuse.fusion.views import padded, places
from speechfuse.rwkv import pth
from speechfuse.tokens import prompts


class _Prompt(list[int]):
    """Token ids, FRAME in place of vectors, and the frames (frames, width) of each clip."""

    clips: list[np.ndarray]


class SpliceGenerator(generation.Generator):
    """A checkpoint that answers conversations whose speech is frames."""

    def _load(self, checkpoint: Path, device: str | None) -> None:
        self.model = generation.load(checkpoint, device, lora=True)
        words = self.model.get_input_embeddings()
        self.door = words if isinstance(words, Door) else folder.add_speech(self.model, checkpoint)

    def zero_state(self) -> None:
        """Begin with zeros in place of the learned state."""
        pth.set_state(self.model, {}, "")

    def speech(self, quantizer: Any, waveforms: list[np.ndarray]) -> list[dict[str, Any]]:
        segments = []
        for waveform in waveforms:
            embedded, (length,) = quantizer.embed_batch([waveform], 1)
            frames = embedded[0, :length].cpu().numpy().astype(np.float16)
            segments.append({"speech": {"frames": frames.tobytes()}})
        return segments

    def prompt(self, turns: list[dict[str, Any]]) -> list[int]:
        clips: list[np.ndarray] = []
        adapter, learned = self.door.adapter, self.door.adapter.prompt
        before = [FRAME] * (0 if learned is None else len(learned))
        ids_of = partial(places, width=adapter.width, stack=adapter.stack, clips=clips)
        ids, _ = prompts.render(self.vocabulary, turns, True, lambda of: before + ids_of(of))
        prompt = _Prompt([self.vocabulary.begin] * self.blog + ids)
        prompt.clips = clips
        return prompt

    def inputs(self, tokens: Tensor, ids: list[list[int]]) -> dict[str, Tensor]:
        clips = [clip for prompt in ids for clip in prompt.clips]  # type: ignore[attr-defined]
        frames, lengths = padded(clips)
        device = tokens.device
        with self.door.hearing(frames.to(device), lengths.to(device)):
            return {"inputs_embeds": self.door(tokens)}
