"""Give a Llama checkpoint its sound tokens.

In: a Hugging Face Llama checkpoint and a quantizer. Out: the same checkpoint with a token for each
code and three more, and an embedding row for each.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from speechfuse import failures
from speechfuse.tokens import initialization, vocabulary
from speechfuse.tokens.vocabulary import END, SOUND, START, SoundLayout


def add_sound_tokens(tokenizer: PreTrainedTokenizerBase, codes: int) -> None:
    """Append sound_start, sound_end, one token per code and the mask code, in this order.

    They are special tokens, so that no text can contain one (see Vocabulary.text).
    """
    names = [START, END, *(SOUND.format(code) for code in range(codes + 1))]
    tokenizer.add_tokens(names, special_tokens=True)


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
    codes' vectors (codes, dim). Raises ValueError when `base` already has sound tokens.
    """
    if vocabulary.read_config(base).get("speechfuse"):
        raise ValueError(f"{base} already has sound tokens: expand the original base model")
    tokenizer = vocabulary.tokenizer_of(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    add_sound_tokens(tokenizer, codes)
    start, end, first = (tokenizer.get_vocab()[name] for name in (START, END, SOUND.format(0)))
    layout = SoundLayout(start, end, first, codes, quantizer)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rng = torch.Generator().manual_seed(seed)
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (layer.get_parameter("weight").data for layer in layers)
    tied = head.data_ptr() == embedding.data_ptr()
    for rows in (embedding,) if tied else (embedding, head):
        std = model.config.initializer_range
        context = initialization.NewRowContext(rows[:start], codes, codebook, std, rng)
        rows[start:] = initialization.new_rows(initialize, context)
    model.config.speechfuse = asdict(layout)
    tokenizer.chat_template = vocabulary.CHAT_TEMPLATE
    with failures.writing(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return layout
