"""The log of a run: a line of numbers for every step.

In: the numbers of every optimizer step. Out: metrics.jsonl (one line a step), TensorBoard's files
under tensorboard/, and where `runtime.tracker` asks for it Weights & Biases or Trackio. Speed and
utilisation count the tokens of samples alone: padding is no work done. A run that is resumed takes
back what came after the restored step.
"""

import importlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from speechfuse import artifact, failures
from speechfuse.train import backbone
from speechfuse.train.gpus import Gpu


@dataclass(frozen=True)
class Flops:
    """Floating-point operations (FLOP) that training takes for a token of a sample.

    `products`: of the matrix products. `attention`: times the tokens that the token may see in its
    own document, itself included. Recomputation is not counted.
    """

    products: float
    attention: float
    formula: str

    @classmethod
    def of(cls, model: nn.Module, shape: dict[str, Any]) -> "Flops":
        """Count those of a decoder, on any device, whose config.json is `shape`. A weight takes 2
        operations in the forward pass, 2 for the gradient of its input where something below it
        trains, and 2 for its own gradient if it trains itself."""
        embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        layers = backbone.of(model).layers
        groups: dict[str, list[Tensor]] = {}  # in the order of the forward pass
        for name, parameter in model.named_parameters():
            if name.startswith(backbone.encoder_prefix(model)):
                continue  # it reads no tokens
            if not any(parameter is each for each in embeddings):
                layer = re.match(rf"{re.escape(layers)}\.\d+", name)
                groups.setdefault(layer[0] if layer else name, []).append(parameter)
        if shape.get("tie_word_embeddings"):
            groups["head"] = embeddings
        weights: Counter[int] = Counter()
        times, reached = 0, any(each.requires_grad for each in embeddings)
        for group, parameters in groups.items():
            trains = any(p.requires_grad for p in parameters)
            # inside a layer there are weights below others
            through = reached or (trains and group.startswith(layers))
            for weight in parameters:
                if weight.ndim > 1:
                    weights[2 + 2 * through + 2 * weight.requires_grad] += weight.numel()
            if group.startswith(layers):
                times += 12 if through else 4
            reached |= trains
        heads = shape["num_attention_heads"]
        width = heads * shape.get("head_dim", shape["hidden_size"] // heads)
        products = float(sum(kind * count for kind, count in weights.items()))
        seen, work = backbone.of(model).seen(shape), float(times * width)
        each = f"of {seen} columns of memory" if seen else "token of its document that it may see"
        counted = " + ".join(f"{kind} x {n:,}" for kind, n in sorted(weights.items(), reverse=True))
        formula = (
            f"FLOP a token = {counted} weights of matrix products (the head's are, the input "
            f"embedding's are not) + {times:,} x {width:,} for each {each}"
        )
        return cls(products + work * (seen or 0), 0.0 if seen else work, formula)

    def of_tokens(self, tokens: int, pairs: int) -> float:
        """Return the FLOP of so many tokens, of which `pairs` may see one another: see pairs_of."""
        return self.products * tokens + self.attention * pairs


def pairs_of(lengths: Iterable[int]) -> int:
    """Count the pairs (token, one it may see) in samples of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


@dataclass(frozen=True)
class Meter:
    """What a step's numbers are measured against: `gpus` GPUs at `dollars` an hour each."""

    flops: Flops
    gpu: Gpu | None
    gpus: int = 1
    dollars: float | None = None

    def about(self) -> str:
        """Say how MFU is computed, or why it is not, in a line."""
        if self.gpu is None or self.gpu.peak is None:
            reason = f": no peak is known of {self.gpu.name}" if self.gpu else " without a GPU"
            return f"MFU is left out{reason}; {self.flops.formula}"
        return (
            f"MFU = useful tokens/s x FLOP a token / ({self.gpus} x {self.gpu.peak / 1e12:g} "
            f"TFLOP/s of {self.gpu.name}, dense bf16); {self.flops.formula}; padding and "
            "recomputation count for nothing"
        )

    def mfu(self, tokens: int, pairs: int, seconds: float) -> float | None:
        """Return the share of the peak of all GPUs that useful work had; None without a peak."""
        if self.gpu is None or self.gpu.peak is None:
            return None
        return self.flops.of_tokens(tokens, pairs) / seconds / self.gpus / self.gpu.peak

    def spent(self, seconds: float) -> float | None:
        """Return the dollars for so many seconds of all GPUs; None where no price is given."""
        return None if self.dollars is None else self.dollars * self.gpus * seconds / 3600


class Metrics:
    """Writes the lines of a run; to be made on rank 0 alone."""

    def __init__(
        self,
        out: Path,
        done: int,
        meter: Meter,
        tracker: str = "none",
        identity: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        """`done`: steps of the restored state. `identity` and `config`: the run's fingerprint and
        keys, under which a tracker goes on with the same run."""
        self.path, self.meter = out / "metrics.jsonl", meter
        lines = read(self.path)
        earlier = [line for line in lines if line["step"] <= done]
        # steps that are taken back were paid for as well
        self._before = max((line.get("elapsed", 0.0) for line in lines), default=0.0)
        self._began = time.perf_counter()
        self._last: dict[str, Any] = {}
        artifact.write_atomic(self.path, "".join(f"{json.dumps(line)}\n" for line in earlier))
        self._board = SummaryWriter(out / "tensorboard", purge_step=done + 1, flush_secs=10)
        self._tracker = tracker_of(tracker)
        if self._tracker:
            name = f"{out.name}-{identity[:8]}"
            id = {"id": name} if tracker == "wandb" else {}  # Trackio finds a run by its name
            self._tracker.init(project="speechfuse", name=name, config=config, resume="allow", **id)

    def add(self, step: int, loss: float, lengths: list[int], seconds: float, **more: Any) -> None:
        """Write the line of a step: `lengths`: tokens of its samples; `seconds`: how long it took;
        `more`: other numbers of it."""
        tokens, pairs = sum(lengths), pairs_of(lengths)
        elapsed = self._before + time.perf_counter() - self._began
        line: dict[str, Any] = {"step": step, "loss": loss, **more}
        infinite = [k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)]
        line |= dict.fromkeys(infinite)  # JSON has no NaN
        line |= {"tokens": tokens, "seconds": round(seconds, 4), "elapsed": round(elapsed, 1)}
        line["tokens_per_s"] = round(tokens / seconds, 1)
        mfu, dollars = self.meter.mfu(tokens, pairs, seconds), self.meter.spent(elapsed)
        measures = {"mfu": mfu, "dollars": dollars}
        line |= {name: round(value, 4) for name, value in measures.items() if value is not None}
        with failures.writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        del numbers["step"]
        with failures.writing(self.path.with_name("tensorboard")):  # of a thread of its own
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._tracker:
            self._tracker.log(numbers, step=step)
        self._last = line

    def shown(self) -> dict[str, str]:
        """Return what the bar shows of the last step, beside the time that is left."""
        line = self._last
        loss = "none" if line["loss"] is None else f"{line['loss']:.3f}"
        shown = {"loss": loss, "tok_s": f"{line['tokens_per_s']:,.0f}"}
        if "mfu" in line:
            shown["MFU"] = f"{line['mfu']:.1%}"
        if "dollars" in line:
            shown["spent"] = f"${line['dollars']:,.2f}"
        return shown

    def close(self) -> None:
        """Wait until all is written."""
        with failures.writing(self.path.with_name("tensorboard")):
            self._board.close()
        if self._tracker:
            self._tracker.finish()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, but for the last where a kill cut it short."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def tracker_of(name: str) -> ModuleType | None:
    """Import what `runtime.tracker` names. Raises ValueError where it is not installed."""
    if name == "none":
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"runtime.tracker={name}: the package {name} is not installed; pip install {name}, or "
            "runtime.tracker=none (metrics.jsonl and TensorBoard's files are written anyway)"
        ) from error
