"""Names and ids of text, control and sound tokens.

In: a Hugging Face Llama checkpoint. Out: a Vocabulary, which gives ids for text, roles and codes.
An expanded checkpoint (tokens.expansion) has <|sound_start|>, <|sound_end|>, then one token per
code and the mask code (513 for WhisperVQ), in the original Llama3-s's order: ids 128256, 128257,
128258-128770 in Llama 3.1. Their layout and the quantizer's identity stand in its config.json under
"speechfuse", and every later job checks them.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechfuse.tokens import layouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END, SOUND = "<|sound_start|>", "<|sound_end|>", "<|sound_{:04d}|>"
EXPAND = "run `just expand` on it first, which adds them, or records those that are there"
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
        """Return the ids of all sound tokens, the mask code's included."""
        return range(self.start, self.first + self.codes + 1)


class Vocabulary:
    """Text, control tokens and (if expanded) sound tokens of one checkpoint, as ids."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", layout: SoundLayout | None) -> None:
        self.tokenizer, self.layout = tokenizer, layout
        self.chat: layouts.Layout | None = None
        self._headers: dict[str, list[int]] = {}
        if "<|start_header_id|>" not in tokenizer.get_vocab():
            self.chat = layouts.of_template(tokenizer)
            self.end_of_turn = next(each for each in self.chat.end if isinstance(each, int))
            ends = tokenizer.eos_token_id
            self.end = ends if isinstance(ends, int) else self.end_of_turn
            begin = tokenizer.bos_token_id
            self.begin = begin if isinstance(begin, int) else self.end
            return
        self.begin = self._id("<|begin_of_text|>")
        self.end = self._id("<|end_of_text|>")
        self.end_of_turn = self._id("<|eot_id|>")
        self._around = [self._id("<|start_header_id|>"), self._id("<|end_header_id|>")]
        self._break = self.text("\n\n")

    @classmethod
    def load(cls, checkpoint: Path) -> "Vocabulary":
        """Return the vocabulary of a Hugging Face folder. Raises ValueError when it has neither
        Llama 3's control tokens nor a chat template that can be read."""
        return cls(tokenizer_of(checkpoint), layout_of(checkpoint))

    def _id(self, token: str) -> int:
        id = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(id, int) or id == self.tokenizer.unk_token_id:
            raise ValueError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no {token}: speechfuse needs "
                "Llama 3's control tokens"
            )
        return id

    def text(self, text: str) -> list[int]:
        """Return the ids of plain text; names of control and sound tokens inside it are encoded as
        text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def header(self, role: str) -> list[int]:
        """Return the ids that begin a turn of `role`."""
        if role not in self._headers:  # of every turn of every sample
            start, end = self._around
            self._headers[role] = [start, *self.text(role), end, *self._break]
        return self._headers[role]

    def sound(self, codes: Any) -> list[int]:
        """Return sound_start, one id per code, sound_end. Raises ValueError without sound tokens
        and for a code out of range."""
        if self.layout is None:
            raise ValueError(f"this checkpoint has no sound tokens: {EXPAND}")
        layout = self.layout
        ids = np.asarray(codes, np.int64) + layout.first
        if len(ids) and ids.max() > layout.first + layout.codes:
            raise ValueError(
                f"code {ids.max() - layout.first} is out of range: this checkpoint has codes "
                f"0-{layout.codes}"
            )
        return [layout.start, *ids.tolist(), layout.end]


def tokenizer_of(checkpoint: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a Hugging Face folder. Every reader of a checkpoint begins here, so
    transformers, which takes seconds to import, is quietened here too."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    read_config(checkpoint)  # or transformers would look for the name on the Hub
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # of many classes
        files = "tokenizer.json and tokenizer_config.json"
        raise ValueError(f"{checkpoint}: {files} cannot be read ({error}); copy them") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises ValueError for other content."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; copy it again")
    return content


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return config.json of a Hugging Face folder. Raises FileNotFoundError without one."""
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no Hugging Face checkpoint at {checkpoint}: no config.json")
    return read_json(path)


def layout_of(checkpoint: Path) -> SoundLayout | None:
    """Return the sound tokens that config.json records; None without. Raises ValueError for a
    record that is not whole, or of ids that the vocabulary does not have."""
    config = read_config(checkpoint)
    if not (block := config.get("speechfuse")):
        return None
    try:
        layout = SoundLayout(**{field.name: block[field.name] for field in fields(SoundLayout)})
        rows = config.get("vocab_size", layout.ids.stop)
        if len(layout.ids) == layout.codes + 3 and layout.ids.stop <= rows:
            return layout
    except (KeyError, TypeError):
        pass
    raise ValueError(
        f"{checkpoint}/config.json: speechfuse={block} is not whole, or does not fit vocab_size"
    )


def read_speech(checkpoint: Path) -> dict[str, Any]:
    """speech.json of a folder that takes frames, else what config.json records under "speechfuse";
    {} of a model of text."""
    path = Path(checkpoint) / "speech.json"
    return read_json(path) if path.is_file() else read_config(checkpoint).get("speechfuse") or {}


def check_quantizer(checkpoint: Path, identity: str, what: str) -> None:
    """Raises ValueError unless `checkpoint` was expanded for the quantizer with this identity, or
    trained on frames of this encoder; `what` names the data that it made."""
    if "encoder" in (speech := read_speech(checkpoint)):
        own: str = speech["encoder"]
    elif layout := layout_of(checkpoint):
        own = layout.quantizer
    else:
        raise ValueError(f"{checkpoint}/config.json records no sound tokens: {EXPAND}")
    if own != identity:
        raise ValueError(
            f"{what} was made with quantizer {identity[:12]}, but {checkpoint} was expanded for "
            f"{own[:12]}: codes or frames of one mean nothing to the other; tokenize again or use "
            "the checkpoint of that quantizer"
        )


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Return the settings of what stands before the encoder of a Hugging Face folder."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            stated = read_json(folder / name)
            return stated.get("feature_extractor", stated)
    raise ValueError(f"{folder} has no preprocessor_config.json: copy it beside config.json")
