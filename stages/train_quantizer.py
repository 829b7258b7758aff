"""Train a small quantizer of the WhisperVQ class on synthetic speech.

    python -m stages.train_quantizer recipes/demo/train_quantizer.yaml

In: a corpus whose utterances carry phoneme times. Out: a quantizer (config.json, model.safetensors)
and, in its manifest, how well its codes tell phonemes on the validation corpus. Resumes from its
last state after a stop.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from speechfuse import artifact, config, tokenizing, workers
from speechfuse.corpora import Clip, Reject
from speechfuse.quantizer import Quantizer, QuantizerConfig
from speechfuse.train import quantizer as training
from speechfuse.train import state


@dataclass
class Runtime:
    workers: int = field(default=2, metadata={"help": "processes that synthesize speech"})
    threads: int = field(default=1, metadata={"help": "threads of the training itself"})
    state_every: int = field(default=250, metadata={"help": "steps between saved states"})


@dataclass
class TrainQuantizer:
    out: str = field(metadata={"help": "folder of the quantizer"})
    corpus: dict[str, Any] = field(metadata={"help": "training speech, with phoneme times"})
    validation: dict[str, Any] = field(metadata={"help": "speech of other voices, to measure"})
    model: QuantizerConfig = field(metadata={"help": "shape of the quantizer"})
    steps: int = field(metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "windows a step"})
    lr: float = field(default=2e-3, metadata={"help": "peak learning rate, cosine to 0"})
    warmup_steps: int = field(default=50, metadata={"help": "linear warm-up"})
    quantize_from: float = field(
        default=0.4, metadata={"help": "share of the steps before the codebook starts"}
    )
    decay: float = field(default=0.95, metadata={"help": "of the codebook's moving average"})
    seed: int = field(default=0, metadata={"help": "of weights and batches"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)


def speak(spec: dict[str, Any], shard: dict[str, Any]) -> list[Clip | Reject]:
    """One shard of a corpus, in a worker process."""
    return list(config.instantiate(spec).clips(shard))


def utterances(spec: dict[str, Any], runtime: Runtime, what: str) -> list[Clip]:
    """All utterances of a synthetic corpus. ValueError when one was rejected or has no phonemes."""
    shards = config.instantiate(spec).plan(250)
    with workers.pool(runtime.workers) as pool:
        made = pool.map(speak, [spec] * len(shards), shards)
        result = [u for shard in tqdm(made, what, len(shards), unit="shard") for u in shard]
    kept = [u for u in result if isinstance(u, Clip) and u.phonemes]
    if len(kept) != len(result):
        raise ValueError(f"{what}: {len(result) - len(kept)} utterances have no phoneme times")
    return kept


def learning_rate(job: TrainQuantizer, step: int) -> float:
    warmup = min(1.0, (step + 1) / job.warmup_steps)
    return job.lr * warmup * (1 + math.cos(math.pi * step / job.steps)) / 2


def measure(model: Quantizer, examples: list[training.Example]) -> dict[str, float]:
    """Phoneme-normalised mutual information of codes and phonemes, and how many codes are used."""
    codes, labels = [], []
    for item in examples:
        window = torch.full((1, item.mel.shape[0], model.frames), training.PADDING)
        window[0, :, : item.mel.shape[1]] = item.mel.float()
        with torch.inference_mode():
            found = model.quantize(model.embed(window))[0].repeat_interleave(2)
        codes.append(found[: len(item.labels)].numpy())
        labels.append(item.labels.numpy())
    every_code, every_label = np.concatenate(codes), np.concatenate(labels)
    known = every_label >= 0
    return {
        "pnmi": round(training.phoneme_information(every_code[known], every_label[known]), 4),
        "codes_used": len(np.unique(every_code)),
    }


def main(job: TrainQuantizer) -> None:
    corpora = {"corpus": job.corpus, "validation": job.validation}
    inputs = {name: config.instantiate(spec).fingerprint for name, spec in corpora.items()}
    out = Path(job.out)
    work = artifact.Artifact(out, "train_quantizer", 1, asdict(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    torch.set_num_threads(job.runtime.threads)
    torch.manual_seed(job.seed)
    model = Quantizer(job.model)
    spoken = {name: utterances(spec, job.runtime, name) for name, spec in corpora.items()}
    names = Counter(training.phoneme_name(n) for u in spoken["corpus"] for _, n in u.phonemes)
    phonemes = sorted(names.keys() | {training.SILENCE})
    examples = {
        name: [training.example(model, u, phonemes) for u in tqdm(group, f"mel {name}")]
        for name, group in spoken.items()
    }
    hours = sum(len(tokenizing.decode(u).waveform) for u in spoken["corpus"]) / 16_000 / 3600
    del spoken
    trainee = training.Trainee(model, len(phonemes), job.decay)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=job.lr, weight_decay=0.01)
    start = state.restore(out / "state", trainee, optimizer)
    bar = tqdm(range(start, job.steps), "training", job.steps, initial=start)
    for step in bar:
        mels, labels = training.batch(
            examples["corpus"], model.frames, job.batch_size, job.seed, step
        )
        logits, commitment = trainee(mels, quantize=step >= job.quantize_from * job.steps)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=training.IGNORE)
        optimizer.param_groups[0]["lr"] = learning_rate(job, step)
        (loss + commitment).backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % job.runtime.state_every == 0 and step + 1 < job.steps:
            state.save(out / "state", step + 1, trainee, optimizer)
    trainee.finish().save(out)
    totals = {"hours": round(hours, 3), "phonemes": len(phonemes), "identity": model.identity}
    totals |= {"loss": round(loss.item(), 4), **measure(model, examples["validation"])}
    work.finish(totals, [out / "config.json", out / "model.safetensors"])
    print(f"{out}: {totals}")


if __name__ == "__main__":
    config.main(main, TrainQuantizer, __doc__)
