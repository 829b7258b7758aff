"""A model of channels at work: frame by frame, or over a session at once.

In: the user's frames. Out: the model's text and codes of each frame. A step reads the user's frame
and what the model itself said in the frame before; its work is the same for each frame, because no
frame sees more than `window` of those before it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from transformers import DynamicCache

from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.codecs.codec import codec_of
from speechfuse.evals import generation
from speechfuse.fusion import folder
from speechfuse.fusion.channels import DELAY, Channels
from speechfuse.fusion.door import Door
from speechfuse.tokens.vocabulary import Vocabulary, check_quantizer, read_speech

UNLIKELY = 0.01  # that a turn begins in this frame: then none is waited for


class Talker:
    """The model in the folder `checkpoint`, whose user's frames the encoder `identity` makes.
    Raises ValueError for a folder of another model, and for another encoder or codec than those of
    its training."""

    def __init__(self, checkpoint: Path, identity: str, device: str | None = None) -> None:
        speech = read_speech(checkpoint) or {}
        if "codec" not in speech:
            raise ValueError(f"{checkpoint} is no model of two channels: it names no codec")
        check_quantizer(checkpoint, identity, "the user's frames")
        spec = {name: value for name, value in speech["codec"].items() if name != "identity"}
        self.codec = codec_of(spec)
        if self.codec.identity != speech["codec"]["identity"]:
            raise ValueError(f"{spec} is not the codec that {checkpoint} was trained with")
        self.model = generation.load(checkpoint, device, lora=True)
        words = self.model.get_input_embeddings()
        self.door = words if isinstance(words, Door) else folder.add_speech(self.model, checkpoint)
        assert isinstance(self.door.adapter, Channels)
        self.adapter: Channels = self.door.adapter
        self.window: int = speech["adapter"]["window"]
        self.vocabulary = Vocabulary.load(checkpoint)

    def begin(self, sessions: int) -> None:
        """Begin so many sessions, with nothing said yet."""
        self.cache: Any = DynamicCache()
        self.frame = 0
        shape = (sessions, 1, self.adapter.codebooks)
        self.codes = torch.full(shape, self.codec.codebook_size + DELAY)
        self.text = torch.full(shape[:2], self.vocabulary.end)
        self.silent = torch.ones(shape[:2])  # how probable it is that no turn has begun by now

    def vectors(self, text: Tensor, codes: Tensor, frames: Tensor) -> Tensor:
        """Return what the model reads of text (sessions, length), codes (sessions, length,
        codebooks) and frames (sessions, length * stack, width)."""
        device = self.model.device
        lengths = torch.full((len(frames),), frames.shape[1], device=device)
        with self.door.hearing(frames.to(device), lengths, codes.to(device)):
            return self.door(text.to(device))

    @torch.inference_mode()
    def logits(self, text: Tensor, codes: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the next text and codes for whole sessions, see `vectors`."""
        length = text.shape[1]
        near = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - self.window)
        mask = near.expand(len(text), 1, -1, -1).to(self.model.device)
        vectors = self.vectors(text, codes, frames)
        hidden = self.model.model(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
        return self._next(hidden)

    def _next(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        text, marks = self.model.lm_head(hidden), self.adapter.marks.to(hidden.dtype)
        text[..., [self.vocabulary.end, self.vocabulary.begin]] += hidden @ marks.T
        return text, self.adapter.logits(hidden)

    @torch.inference_mode()
    def step(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Hear one frame (sessions, stack, width); return the logits of the next text (sessions, 1,
        vocabulary) and codes (sessions, 1, codebooks, size), the likeliest of which are said. A
        turn also begins where one has more probably begun by now than not, all frames together:
        in none of them that is the likeliest, since people wait for shorter or longer."""
        vectors = self.vectors(self.text, self.codes, frames)
        places = torch.full((len(frames), 1), self.frame, device=vectors.device)
        output = self.model.model(
            inputs_embeds=vectors, past_key_values=self.cache, position_ids=places, use_cache=True
        )
        for layer in self.cache.layers:  # the oldest leave the window of the next frame
            layer.keys, layer.values = (
                each[:, :, max(0, each.shape[2] + 1 - self.window) :]
                for each in (layer.keys, layer.values)
            )
        text, codes = self._next(output.last_hidden_state)
        self.text, self.codes, self.frame = self._begun(text), codes.argmax(-1), self.frame + 1
        return text, codes

    def _begun(self, logits: Tensor) -> Tensor:
        begin, likeliest = self.vocabulary.begin, logits.argmax(-1)
        share = logits.softmax(-1)[..., begin].cpu()
        self.silent = (self.silent * (1 - share)).masked_fill(share < UNLIKELY, 1.0)
        due = (self.silent < 0.5).to(logits.device) & (likeliest == self.vocabulary.end)
        text = likeliest.masked_fill(due, begin)
        self.silent = self.silent.masked_fill((text == begin).cpu(), 1.0)
        return text

    def talk(self, frames: Iterable[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Return text (sessions, n) and codes (sessions, n, codebooks) said to n frames, each
        (sessions, stack, width): the sound of each frame, and the text of the one behind it."""
        said = list[tuple[Tensor, Tensor]]()
        for part in frames:
            if not said:
                self.begin(len(part))
            self.step(part)
            said.append((self.text.cpu(), self.codes.cpu()))
        text, codes = (torch.cat(each, 1).numpy() for each in zip(*said, strict=True))
        return text, codes

    def sound(self, codes: np.ndarray) -> np.ndarray:
        """Return the waveform of a session's codes (n, codebooks), marks as silence. They are of
        the frames from the first on: in time with the user's."""
        marks = np.any(codes >= self.codec.codebook_size, axis=1, keepdims=True)
        return self.codec.decode(np.where(marks, self.codec.silence(), codes))

    def turns(self, text: np.ndarray) -> list[dict[str, Any]]:
        """Return {text, start, end: seconds} of what is said in a session's text (n,)."""
        turns, seconds = list[dict[str, Any]](), 1 / self.codec.frame_rate
        for frame, token in enumerate(text.tolist(), 1):
            if token == self.vocabulary.begin:
                turns.append({"ids": [], "start": frame * seconds, "end": None})
            elif turns and turns[-1]["end"] is None and token != self.vocabulary.end:
                if token == self.vocabulary.end_of_turn:
                    turns[-1]["end"] = frame * seconds
                else:
                    turns[-1]["ids"].append(token)
        for turn in turns:
            turn["text"] = str(self.vocabulary.tokenizer.decode(turn.pop("ids"))).strip()
            turn["end"] = turn["end"] or (len(text) + 1) * seconds
        return turns


def write_stereo(path: Path, user: np.ndarray, own: np.ndarray, rate: int) -> float:
    """Write the user's waveform, at 16 kHz, left and the model's, at `rate`, right; both at `rate`
    and as long as the shorter. Return the seconds of it."""
    user = soxr.resample(user, SAMPLE_RATE, rate)
    length = min(len(user), len(own))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([user[:length], own[:length]], 1), rate)
    return length / rate
