"""Give a Llama checkpoint its sound tokens.

In: a Hugging Face Llama checkpoint and a quantizer. Out: the same checkpoint with a token for each
code and three more, and an embedding row for each. A checkpoint of others that has all of them (a
published Ichigo or Llama3-s) keeps them and their rows as they are.
"""

import re
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from speechfuse import failures
from speechfuse.tokens import initialization, vocabulary, weights
from speechfuse.tokens.vocabulary import END, SOUND, START, SoundLayout, Vocabulary

SOUND_TOKEN = re.compile(r"<\|sound_\w+\|>")
PADDING = 8, 16, 32, 64, 128, 256  # an embedding may be filled up to a multiple of one of these


def sound_tokens(codes: int) -> list[str]:
    """The names of sound_start, sound_end, one token per code and the mask code, in this order."""
    return [START, END, *(SOUND.format(code) for code in range(codes + 1))]


def add_sound_tokens(tokenizer: PreTrainedTokenizerBase, codes: int) -> None:
    """Append sound_tokens(codes); those that are there keep their ids.

    They are special tokens, so that no text can contain one (see Vocabulary.text).
    """
    tokenizer.add_tokens(sound_tokens(codes), special_tokens=True)


def has_sound_tokens(base: Path, tokenizer: PreTrainedTokenizerBase, codes: int) -> bool:
    """Whether `base` has the sound tokens of `codes` codes already.

    Raises ValueError when they are ours already, when only some are there, others beside them, in
    another order or not the last, when the embedding has other rows than the tokenizer and padding,
    and without Llama 3's control tokens.
    """
    if recorded := vocabulary.layout_of(base):
        raise ValueError(
            f"{base} already has sound tokens, of quantizer {recorded.quantizer[:12]}: train from "
            "it as it is, or expand the original base model"
        )
    llama = vocabulary.read_config(base).get("model_type") != "speechfuse_rwkv"
    if Vocabulary(tokenizer, None).chat or not llama:
        raise ValueError(f"{base}: sound tokens are added beside Llama 3's control tokens alone")
    vocab, names = tokenizer.get_vocab(), sound_tokens(codes)
    size, rows = max(vocab.values()) + 1, vocabulary.read_config(base)["vocab_size"]
    if rows not in (size, *(-(-size // multiple) * multiple for multiple in PADDING)):
        raise ValueError(
            f"{base}: the embedding has {rows:,} rows, but the tokenizer has {size:,} tokens, "
            f"{tokenizer.convert_ids_to_tokens(size - 1)} the last: take the tokenizer that was "
            "published with these weights"
        )
    count = sum(bool(SOUND_TOKEN.fullmatch(name)) for name in vocab)
    if not count:
        return False
    start = min(id for name, id in vocab.items() if SOUND_TOKEN.fullmatch(name))
    last = sorted((id, name) for name, id in vocab.items() if id >= start)
    if last != [*enumerate(names, start)]:
        lacks = [name for name in names if name not in vocab]
        more = [name for _, name in last if name not in names]
        raise ValueError(
            f"{base} has {count:,} sound tokens; for {codes:,} codes its last tokens must be, in "
            f"this order, {', '.join(names[:3])} to {names[-1]}: "
            + (f"{weights.few(lacks)} missing; " if lacks else "")
            + (f"{weights.few(more)} among or behind them; " if more else "")
            + ("" if lacks or more else f"{last[0][1]} is the first; ")
            + "name the quantizer that it was trained with, or expand the original base model"
        )
    return True


def expand(
    base: Path,
    out: Path,
    codes: int,
    quantizer: str,
    seed: int,
    initialize: dict[str, Any],
    codebook: Tensor | None = None,
) -> SoundLayout:
    """Write `base` with sound tokens for `codes` codes and the mask code to `out`.

    `quantizer`: its identity; `initialize` {_component_, ...}: a function of tokens.initialization
    for the new rows of the embedding and, where it is another matrix, of the head; `codebook`: the
    codes' vectors (codes, dim). Weights keep the widest dtype that one of them has. Rows of sound
    tokens that are there, and padding behind those, stay as they are. Raises ValueError as
    weights.headers and has_sound_tokens.
    """
    stored = {getattr(torch, header.dtype) for header in weights.headers(base).values()}
    tokenizer = vocabulary.tokenizer_of(base)
    there = has_sound_tokens(base, tokenizer, codes)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=reduce(torch.promote_types, stored))
    add_sound_tokens(tokenizer, codes)
    start, end, first = (tokenizer.get_vocab()[name] for name in (START, END, SOUND.format(0)))
    layout = SoundLayout(start, end, first, codes, quantizer)
    if not there:
        _add_rows(model, layout, initialize, codebook, torch.Generator().manual_seed(seed))
    model.config.speechfuse = asdict(layout)
    tokenizer.chat_template = vocabulary.CHAT_TEMPLATE
    with failures.writing(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return layout


def _add_rows(
    model: Any,
    layout: SoundLayout,
    initialize: dict[str, Any],
    codebook: Tensor | None,
    rng: torch.Generator,
) -> None:
    """Give embedding and head rows for the sound tokens, in place of padding if there is any."""
    model.resize_token_embeddings(layout.ids.stop, mean_resizing=False)
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (layer.get_parameter("weight").data for layer in layers)
    tied = head.data_ptr() == embedding.data_ptr()
    for rows in (embedding,) if tied else (embedding, head):
        std, old = model.config.initializer_range, rows[: layout.start]
        context = initialization.NewRowContext(old, layout.codes, codebook, std, rng)
        rows[layout.start :] = initialization.new_rows(initialize, context)
