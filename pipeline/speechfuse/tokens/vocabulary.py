"""Names and ids of text, control and sound tokens.

In: a Hugging Face Llama checkpoint. Out: a Vocabulary, which gives ids for text, roles and codes.
An expanded checkpoint (tokens.expansion) has <|sound_start|>, <|sound_end|>, then one token per
code and the mask code (513 for WhisperVQ), in the original Llama3-s's order: ids 128256, 128257,
128258-128770 in Llama 3.1. Their layout and the quantizer's identity stand in its config.json under
"speechfuse", and every later job checks them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END, SOUND = "<|sound_start|>", "<|sound_end|>", "<|sound_{:04d}|>"
CHAT_TEMPLATE = (  # Llama 3's layout without the system block that its own template always adds
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class SoundLayout:
    """Ids of the sound tokens: `first` is code 0, `codes` the number of codes without the mask
    code."""

    start: int
    end: int
    first: int
    codes: int
    quantizer: str

    @property
    def ids(self) -> range:
        """Ids of all sound tokens, the mask code's included."""
        return range(self.start, self.first + self.codes + 1)


class Vocabulary:
    """Text, control tokens and (if expanded) sound tokens of one checkpoint, as ids."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", layout: SoundLayout | None) -> None:
        self.tokenizer, self.layout = tokenizer, layout
        self.begin = self._id("<|begin_of_text|>")
        self.end = self._id("<|end_of_text|>")
        self.end_of_turn = self._id("<|eot_id|>")
        self._header = [self._id("<|start_header_id|>"), self._id("<|end_header_id|>")]
        self._break = self.text("\n\n")

    @classmethod
    def load(cls, checkpoint: Path) -> "Vocabulary":
        """The vocabulary of a Hugging Face folder. Raises ValueError when it has no Llama-3 control
        tokens."""
        layout = read_config(checkpoint).get("speechfuse")
        return cls(tokenizer_of(checkpoint), SoundLayout(**layout) if layout else None)

    def _id(self, token: str) -> int:
        id = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(id, int) or id == self.tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no {token}: speechfuse needs Llama 3's control tokens"
            )
        return id

    def text(self, text: str) -> list[int]:
        """Ids of plain text; names of control and sound tokens inside it are encoded as text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def header(self, role: str) -> list[int]:
        """Ids that begin a turn of `role`."""
        start, end = self._header
        return [start, *self.text(role), end, *self._break]

    def sound(self, codes: Any) -> list[int]:
        """sound_start, one id per code, sound_end. Raises ValueError without sound tokens and for a
        code out of range."""
        if self.layout is None:
            raise ValueError("this checkpoint has no sound tokens: `just expand` gives it some")
        layout = self.layout
        ids = np.asarray(codes, np.int64) + layout.first
        if len(ids) and ids.max() > layout.first + layout.codes:
            raise ValueError(
                f"code {ids.max() - layout.first} is out of range: this checkpoint has codes "
                f"0-{layout.codes}"
            )
        return [layout.start, *ids.tolist(), layout.end]


def tokenizer_of(checkpoint: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder. Every reader of a checkpoint begins here, so
    transformers, which takes seconds to import, is quietened here too."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(checkpoint)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder. Raises FileNotFoundError without one."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no Hugging Face checkpoint at {checkpoint}: it has no config.json"
        )
    return json.loads(path.read_text())


def check_quantizer(checkpoint: Path, identity: str, what: str) -> None:
    """Raises ValueError unless `checkpoint` was expanded for the quantizer with this identity;
    `what` names the data that the quantizer made."""
    layout = read_config(checkpoint).get("speechfuse")
    if layout is None:
        raise ValueError(f"{checkpoint} has no sound tokens: `just expand` gives it some")
    if layout["quantizer"] != identity:
        raise ValueError(
            f"{what} was made with quantizer {identity[:12]}, but {checkpoint} was expanded for "
            f"{layout['quantizer'][:12]}: codes of one mean nothing to the other; "
            "tokenize again or use the checkpoint of that quantizer"
        )
