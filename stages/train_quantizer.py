"""Train a quantizer of the WhisperVQ class.

    python -m stages.train_quantizer recipes/demo/train_quantizer.yaml

In: a corpus, another to measure on, and a method: `speechfuse.quantizer.whisper` (any
speech with transcripts, and a Whisper) or `speechfuse.quantizer.phonemes` (speech whose
phonemes are known, or any speech and a quantizer that guesses them). Out: a quantizer
(config.json, model.safetensors, and what the method adds) and, in its manifest, how good its codes
are on the validation corpus. Resumes from its last state after a stop and ends with the same bits
on a CPU.
"""

import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from speechfuse import artifact, config, workers
from speechfuse.config import key
from speechfuse.hub import data as hub_data
from speechfuse.train.config import check_warmup

if TYPE_CHECKING:  # torch is imported when work starts
    from torch import Tensor, nn, optim

SHARD = 250  # clips; espeak-ng starts anew with each, so another size is other speech


@dataclass
class Runtime:
    workers: int = key("processes that decode or synthesize speech", 2, least=1, most=4096)
    device: str = key("cpu, cuda, or auto: cuda where present", "auto")
    threads: int = key("CPU threads of the training itself", 1, least=1, most=4096)
    state_every: int = key("steps between saved states", 250, least=1)
    max_reject_rate: float = key("more unusable clips stop the job", 0.1, least=0, most=1)


@dataclass
class TrainQuantizer:
    out: str = key("folder of the quantizer")
    corpus: dict[str, Any] = key("training speech, of speechfuse.corpora")
    validation: dict[str, Any] = key("speech of other voices, to measure")
    method: dict[str, Any] = key("what is trained, and towards what")
    steps: int = key("optimizer steps", least=1)
    more: list[dict[str, Any]] = key("further corpora, each `times` in an epoch, by default 1", [])
    batch_size: int = key("windows a step", 16, least=1, most=4096)
    lr: float = key("peak learning rate, cosine to 0", 2e-3, above=0)
    warmup_steps: int = key("linear warm-up", 50, least=0)
    compute_dtype: str = key("of the products: fp32 or bf16", "fp32", choices=("fp32", "bf16"))
    seed: int = key("of weights and batches", 0, least=0)
    fresh: bool = key("move an artifact that differs aside", False)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        check_warmup(self.warmup_steps, self.steps)


def learning_rate(job: TrainQuantizer, step: int) -> float:
    warmup = min(1.0, (step + 1) / max(1, job.warmup_steps))
    return job.lr * warmup * (1 + math.cos(math.pi * step / job.steps)) / 2


def optimizer_of(trainee: "nn.Module", lr: float) -> "optim.Optimizer":
    """AdamW whose state is there from the start: a parameter that gets its first gradient late
    would otherwise be missing in the states saved before, and these could not be loaded."""
    import torch

    trained = [p for p in trainee.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    for parameter in trained:
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def train(job: TrainQuantizer, method: Any, trainee: "nn.Module") -> dict[str, float]:
    """The losses of the last step."""
    import torch

    from speechfuse.train import state

    folder = Path(job.out) / "state"
    optimizer = optimizer_of(trainee, job.lr)
    states = state.States(folder, trainee, optimizer)
    if start := states.restore():
        print(f"{job.out}: goes on at step {start + 1:,} of {job.steps:,}")
    losses: dict[str, Tensor] = {}
    device, narrow = next(trainee.parameters()).device.type, job.compute_dtype == "bf16"
    bar = tqdm(range(start, job.steps), "training", job.steps, initial=start)
    for step in bar:
        with torch.autocast(device, torch.bfloat16, narrow):
            losses = method.losses(step, job.steps, job.batch_size, job.seed)
        optimizer.param_groups[0]["lr"] = learning_rate(job, step)
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            states.wait()
            raise ValueError(
                f"{job.out}: the loss of step {step + 1} is {total.item()}: lower lr, or look at "
                "the corpus; a state that was saved before is kept"
            )
        total.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()})
        if (step + 1) % job.runtime.state_every == 0 and step + 1 < job.steps:
            states.save(step + 1)
    states.wait()
    return {name: round(loss.item(), 4) for name, loss in losses.items()}


def main(job: TrainQuantizer) -> None:
    out, runtime = Path(job.out), job.runtime
    specs, times = {"corpus": job.corpus, "validation": job.validation}, {"corpus": 1}
    for i, spec in enumerate(job.more):
        specs[name := f"more.{i}"] = {key: v for key, v in spec.items() if key != "times"}
        times[name] = spec.get("times", 1)
        if not isinstance(times[name], int) or times[name] < 1:
            raise ValueError(f"{name}.times={times[name]!r}: give a whole number, at least 1")
    corpora = {name: config.instantiate(spec) for name, spec in specs.items()}
    import torch  # now that what can be refused has been

    from speechfuse.quantizer.training.mels import load, make

    device = (workers.gpus(runtime.device) or ["cpu"])[0]
    torch.set_num_threads(runtime.threads)
    torch.manual_seed(job.seed)
    method = config.instantiate(job.method)
    started = None if job.fresh else out
    inputs = {
        name: hub_data.pinned_commit(corpus.fingerprint, name, started)
        for name, corpus in corpora.items()
    }
    inputs |= method.inputs
    settings = asdict(job)
    if job.compute_dtype == "fp32":  # a key that came later: what was begun without it goes on
        del settings["compute_dtype"]
    work = artifact.Artifact(out, "train_quantizer", 5, settings, inputs)
    if not work.begin(lambda: {n: of.plan(SHARD) for n, of in corpora.items()}, fresh=job.fresh):
        return
    mels = out / "mels"
    make(specs, work.plan, mels, method.window, runtime.workers, runtime.device)
    loaded = {name: load(mels / name, method.window, runtime.max_reject_rate) for name in specs}
    training = [each for name, count in times.items() for each in loaded[name][0] * count]
    trainee = method.begin(training, loaded["validation"][0], device)
    losses = train(job, method, trainee)
    totals, outputs = method.finish(out)
    totals |= {"losses": losses, "speech": {name: counts for name, (_, counts) in loaded.items()}}
    work.finish(totals, outputs)
    shutil.rmtree(mels)
    print(f"{out}: {totals}")


if __name__ == "__main__":
    config.main(main, TrainQuantizer, __doc__)
