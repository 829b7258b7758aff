"""Datasets of a recipe: from rows on disk to the batch of every optimizer step.

In: a recipe's `datasets`, each with a share, and the plan that packs them. Out: for any step the
same batch, whatever the number of ranks. Codes become vocabulary ids here, when a step needs them.
`sound`, `speech` and `conversations` are the views that a dataset entry can name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor
from torch.utils.data import Dataset

from speechfuse import artifact, config
from speechfuse.components import Share
from speechfuse.locks import exclusive_lock
from speechfuse.rows import several, shards
from speechfuse.samples import index, packing
from speechfuse.samples.view import Collate, Sample, View
from speechfuse.tokens import prompts
from speechfuse.tokens.vocabulary import Vocabulary, check_quantizer


def _view(
    path: str,
    select: dict[str, Any] | None,
    train_on: str,
    column: str,
    render: Callable[[dict[str, Any]], tuple[list[int], list[bool]] | None],
    at_step: Callable[[Sample, int], Sample] | None = None,
) -> View:
    names = pq.read_schema(shards.shard_paths(Path(path))[0]).names
    if "frames" in names:
        raise ValueError(f"{path} holds frames: its _component_ is speechfuse.fusion.speech")
    if column not in names:
        here, fits = {
            "codes": ("conversations", "conversations (and takes no turns)"),
            "turns": ("rows of speech", "speech or .sound"),
        }[column]
        raise ValueError(f"{path} holds {here}: its _component_ is speechfuse.samples.{fits}")
    check_train_on(train_on)

    def sample(row: dict[str, Any]) -> Sample | None:
        if (rendered := render(row)) is None:
            return None
        tokens, targets = rendered
        if train_on == "all":
            targets = [False] + [True] * (len(tokens) - 1)
        return Sample(row["id"], np.array(tokens, np.int32), np.array(targets))

    return View(Path(path), select or {}, sample, at_step=at_step)


def answered(row: dict[str, Any], turns: dict[str, Any]) -> bool:
    """Return whether a speech row has a transcript, or for samples.context an answer of its own: a
    piece of a split recording has neither."""
    if row["text"] is not None or not turns["_component_"].endswith("samples.context"):
        return row["text"] is not None
    return bool(row["extra"].get("answer") and row.get("part") is None)


def check_train_on(value: str) -> None:
    """Raise ValueError unless `value` is answers or all."""
    if value not in ("answers", "all"):
        raise ValueError(f"train_on={value!r}: choose answers or all")


def sound(vocabulary: Vocabulary, path: str, select: dict[str, Any] | None = None) -> View:
    """Stage 1: the codes of speech rows alone, all of them targets. A row of several recordings is
    rejected: no sound goes on across their border."""
    return _view(
        path,
        select,
        "answers",
        "codes",
        lambda row: prompts.render_sound(vocabulary, several.alone(row)["codes"]),
    )


def speech(
    vocabulary: Vocabulary,
    path: str,
    turns: dict[str, Any],
    select: dict[str, Any] | None = None,
    train_on: str = "answers",
    replaced: Share = 0.0,
) -> View:
    """Speech rows made into conversations by `turns` (a function of samples.instructions). Rows
    that `answered` leaves out have no sample; the index counts them. `replaced`: in each step every
    code that is no target gives way to any with this probability, as if it were misheard."""
    turns_of = config.bind(turns, "row")

    def render(row: dict[str, Any]) -> tuple[list[int], list[bool]] | None:
        if not answered(row, turns):
            return None
        return prompts.render(vocabulary, turns_of(row=row), draw=row.get("draw"))

    def misheard(sample: Sample, step: int) -> Sample:
        rng = np.random.default_rng([artifact.id_digest(sample.name), step])
        tokens, layout = sample.tokens.copy(), vocabulary.layout
        assert layout  # it was rendered with that
        heard = (tokens >= layout.first) & (tokens < layout.first + layout.codes)
        heard &= ~sample.targets & (rng.random(len(tokens)) < replaced)
        tokens[heard] = layout.first + rng.integers(layout.codes, size=heard.sum())
        return replace(sample, tokens=tokens)

    return _view(path, select, train_on, "codes", render, misheard if replaced else None)


def conversations(
    vocabulary: Vocabulary,
    path: str,
    select: dict[str, Any] | None = None,
    train_on: str = "answers",
) -> View:
    """Rows of conversations: text replay, spoken instructions, the text training of a base model.
    `train_on`: answers, or all tokens."""
    return _view(
        path, select, train_on, "turns", lambda row: prompts.render(vocabulary, row["turns"])
    )


@dataclass
class Mixture:
    """The datasets of a recipe, `paths` as it names them, and the plan of all its steps. In the
    share `joined` of a step's rows the samples are turns of one conversation."""

    vocabulary: Vocabulary
    paths: list[str]
    indexes: list[index.Index]
    plan: packing.Plan
    joined: float = 0.0

    def lengths(self, step: int) -> list[list[int]]:
        """Tokens of the samples of a step, by row of the batch."""
        rows, indexes = self.plan.rows(step), self.indexes
        return [[int(indexes[d].lengths[number]) for d, number in row] for row in rows]

    @property
    def collate(self) -> Collate:
        """How samples become a batch, see View."""
        return self.indexes[0].view.collate

    def samples(self, step: int, rank: int = 0, ranks: int = 1) -> list[list[Sample]]:
        """The rendered samples of a step, by row of the batch: every row, or those of a rank."""
        rows = self.plan.rows(step)  # in an order that was drawn
        samples = [[self.sample(step, *place) for place in row] for row in rows[rank::ranks]]
        begin, many = self.vocabulary.begin, round(self.joined * len(rows))
        for row in samples[: len(range(rank, many, ranks))]:
            row[1:] = [sample.going_on(begin) for sample in row[1:]]
        return samples

    def sample(self, step: int, dataset: int, number: int) -> Sample:
        """A sample of `dataset` as it is in a step."""
        return self.indexes[dataset].at(number, step)


def load(
    specs: list[dict[str, Any]],
    checkpoint: Path,
    shape: packing.Shape,
    epochs: int,
    steps: int | None,
    seed: int,
    folder: Path,
    joined: float = 0.0,
) -> Mixture:
    """The mixture that a recipe's `datasets` describe: entries {_component_, path, share, ...}.

    Indexes and plan are kept in the cache `folder`. Raises ValueError when codes were made with
    another quantizer than `checkpoint` knows, for shares that are not positive, for views that
    collate differently, for no dataset or one without a sample, and for `joined` where samples are
    no conversations or are not packed.
    """
    lone = [s["path"] for s in specs if str(s.get("_component_")).endswith((".sound", ".duplex"))]
    if joined and (lone or not shape.packed):
        why = f"{lone[0]} holds no conversations" if lone else "packed=false puts one into a row"
        raise ValueError(f"joined={joined:g}: {why}: leave joined out")
    if not specs:
        raise ValueError("datasets is empty: name one at least")
    shares, indexes = [], []
    for spec in specs:
        share = spec.get("share")
        if "path" not in spec or not isinstance(share, int | float) or not 0 < share < inf:
            raise ValueError(f"datasets entry {spec}: it needs a path and a share above 0")
        stream = shards.read_stream(Path(spec["path"]))
        if "quantizer" in stream and not spec.get("encoder"):  # that reads the recordings alone
            check_quantizer(checkpoint, stream["quantizer"], spec["path"])
        entry = {key: value for key, value in spec.items() if key != "share"}
        indexes.append(index.build(entry, checkpoint, folder))
        if not len(indexes[-1]) and (reasons := indexes[-1].said()):
            raise ValueError(f"{spec['path']} holds no sample to train on: {'; '.join(reasons)}")
        shares.append(share)
    if len({each.view.collate for each in indexes}) > 1:
        raise ValueError("datasets: their samples make different kinds of batches: train apart")
    what = [each.key for each in indexes], shares, shape, epochs, steps, seed
    key = index.key_of(packing.VERSION, *what)
    lengths, parts = [each.lengths for each in indexes], [share / sum(shares) for share in shares]
    with exclusive_lock(folder):
        plan = packing.make(lengths, parts, shape, epochs, steps, seed, folder / f"plan-{key}")
    vocabulary, paths = Vocabulary.load(checkpoint), [spec["path"] for spec in specs]
    return Mixture(vocabulary, paths, indexes, plan, joined)


class Batches(Dataset):
    """One rank's micro-batches of every step, to be loaded by torch's DataLoader."""

    def __init__(self, mixture: Mixture, rank: int, ranks: int, micro: int) -> None:
        self.mixture, self.rank, self.ranks, self.micro = mixture, rank, ranks, micro

    def __getitem__(self, step: int) -> list[dict[str, Tensor]] | Exception:
        """The micro-batches of `step` (from 0), or what is wrong with a row: raised here, it would
        reach the user as the traceback of a worker."""
        shape, vocabulary = self.mixture.plan.shape, self.mixture.vocabulary
        try:
            own = self.mixture.samples(step, self.rank, self.ranks)
        except (ValueError, FileNotFoundError) as error:
            return error
        parts = [own[start : start + self.micro] for start in range(0, len(own), self.micro)]
        lengths = [shape.seq_len if shape.packed else longest(part) for part in parts]
        return [
            self.mixture.collate(part, length, vocabulary.end, vocabulary.layout)
            for part, length in zip(parts, lengths, strict=True)
        ]


def longest(rows: list[list[Sample]]) -> int:
    """Tokens of the fullest row, at least 1."""
    return max((sum(len(sample.tokens) for sample in row) for row in rows), default=1) or 1
