"""A Whisper small enough to be trained here: it transcribes forty words that espeak-ng speaks.

In: nothing. Out: the corpora that it is trained and tried on, and {dims, model_state_dict} in
openai-whisper's format, with the published .en vocabulary and a window of 2.4 s. Used by
prove_quantizer.py.
"""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import whisper
import yaml
from torch import nn
from tqdm import tqdm
from whisper.model import ModelDimensions

from speechfuse import config, yaml_values
from speechfuse.quantizer.encoder import PADDING
from speechfuse.quantizer.training import mels as examples
from speechfuse.quantizer.training.batches import SILENCE, labelled, phoneme_name
from speechfuse.quantizer.training.mels import Example, Window, make

WORDS = (
    "red green blue yellow black white brown purple cat dog horse bird fish mouse sheep lion tiger "
    "house table window garden river mountain apple bread water butter sugar coffee doctor teacher "
    "winter summer morning music paper silver kitchen happy little"
).split()
DIMS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=120,
    n_audio_state=96,
    n_audio_head=2,
    n_audio_layer=3,
    n_vocab=51_864,
    n_text_ctx=16,
    n_text_state=96,
    n_text_head=2,
    n_text_layer=2,
)
WINDOW = Window(DIMS.n_mels, DIMS.n_audio_ctx / 50, "text")


def corpora(folder: Path, training: int, validation: int) -> dict[str, dict[str, Any]]:
    """Two corpora of one to four words a clip: training, and validation whose sentences and voices
    are in no training."""
    demo = yaml_values.with_files(
        yaml.safe_load(Path("recipes/demo/train_quantizer.yaml").read_text())
    )
    rng, lines, seen = random.Random(0), [], set()
    while len(lines) < training + validation:
        split = "training" if len(lines) < training else "validation"
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
        if split == "validation" and (text in seen or " " not in text):
            continue
        seen.add(text)
        voices = {"training": "train", "validation": "unseen"}[split]
        id = f"{split}-{len(lines)}"
        lines.append({"id": id, "text": text, "split": split, "voices": voices})
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = {
        name: {**group, "rate": [150, 215]} for name, group in demo["corpus"]["voices"].items()
    }
    spoken = {"_component_": "speechfuse.corpora.synthetic", "lines": str(path), "voices": groups}
    return {split: {**spoken, "splits": [split]} for split in ("training", "validation")}


def load(corpora: dict[str, dict[str, Any]], folder: Path) -> dict[str, list[Example]]:
    """The clips of both corpora."""
    plans = {name: config.instantiate(spec).plan(250) for name, spec in corpora.items()}
    make(corpora, plans, folder, WINDOW, 1)
    return {name: examples.load(folder / name, WINDOW, 0.02)[0] for name in corpora}


def train(path: Path, speech: list[Example], steps: int, size: int = 16) -> None:
    """Train from random weights and write `path`.

    Of the vocabulary all entries that no transcript has share one row, counted as often as there
    are: the very softmax over all of them, at the price of a few. The encoder also learns to name
    the phonemes, without which the decoder takes ten times as long to find where to listen.
    """
    torch.manual_seed(0)
    model = whisper.model.Whisper(DIMS)
    tokenizer = whisper.tokenizer.get_tokenizer(False)
    begin = tokenizer.sot_sequence_including_notimestamps
    texts = [[*begin, *tokenizer.encode(f" {each.text}"), tokenizer.eot] for each in speech]
    used = sorted({token for text in texts for token in text})
    place = {token: i for i, token in enumerate(used)}
    others = torch.zeros(len(used) + 1)
    others[-1] = math.log(DIMS.n_vocab - len(used))
    small = model.decoder.token_embedding = nn.Embedding(len(used) + 1, DIMS.n_text_state)
    nn.init.normal_(small.weight, std=0.1)
    nn.init.normal_(model.decoder.positional_embedding, std=0.1)
    names = {phoneme_name(name) for each in speech for _, name in each.phonemes}
    phonemes = sorted(names | {SILENCE})
    labels = [labelled(each, phonemes).labels for each in speech]
    head = nn.Linear(DIMS.n_audio_state, len(phonemes))
    trained = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.01)
    bar = tqdm(range(steps), "micro-Whisper")
    for step in bar:
        chosen = random.Random(step).sample(range(len(speech)), size)
        mels = torch.full((size, DIMS.n_mels, 2 * DIMS.n_audio_ctx), PADDING)
        longest = max(len(texts[i]) for i in chosen)
        tokens = torch.full((size, longest), place[tokenizer.eot])
        targets = torch.full((size, longest), -100)
        sounds = torch.full((size, DIMS.n_audio_ctx), -100)
        for row, i in enumerate(chosen):
            mels[row, :, : speech[i].frames] = speech[i].mel
            sounds[row, : len(labels[i])] = labels[i]
            ids = torch.tensor([place[token] for token in texts[i]])
            tokens[row, : len(ids)] = ids
            targets[row, len(begin) - 1 : len(ids) - 1] = ids[len(begin) :]
        features = model.encoder(mels)
        logits = model.decoder(tokens, features) + others
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        named = F.cross_entropy(head(features).flatten(0, 1), sounds.flatten())
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = 2e-3 * warm * (1 + math.cos(math.pi * step / steps)) / 2
        (loss + named).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", phonemes=f"{named.item():.3f}")
    whole = nn.Embedding(DIMS.n_vocab, DIMS.n_text_state)
    with torch.no_grad():
        whole.weight[:] = small.weight[-1]
        whole.weight[used] = small.weight[:-1]
    model.decoder.token_embedding = whole
    torch.save({"dims": asdict(DIMS), "model_state_dict": model.state_dict()}, path)
