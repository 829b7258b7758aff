"""Rows of the sound tokens: alone in training at first, on one rank and two, how many moved, and
the verdict."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from speechfuse.tokens import expansion
from speechfuse.tokens.vocabulary import SoundLayout
from speechfuse.train import attention
from speechfuse.train import model as models
from speechfuse.train.new_rows import WATCHED, NewRows
from tests.small_training import built, on_two_ranks
from tests.test_model import BASE, LORA, TIED, batch_of, make_tied, spec_of, total, whole

# amid the 943 rows of the demo's base: two ranks have 472 and 471, and so both have new ones
LAYOUT = SoundLayout(start=465, end=466, first=467, codes=16, quantizer="")
IDS = slice(465, 484)
FIRST, STEPS = 3, 5


def make(folder: Path, spec: dict[str, Any] | None = None, **options: Any) -> Any:
    return built(folder, spec or spec_of(folder), **options)


def batch_with_new_rows() -> dict[str, Any]:
    """Among them the last of the first rank's rows and the first of the second's."""
    batch = batch_of(4)
    batch["tokens"][:, 1:4] = torch.tensor([466, 471, 472])
    return batch


def train(
    model: Any,
    first: int,
    steps: int,
    part: slice = slice(None),
    only: bool = False,
    **options: Any,
):
    """Rows, optimizer, weights before and after every step, and what was measured."""
    rows = NewRows(model, LAYOUT, first, only)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.1} | options)
    batch = {key: value[part] for key, value in batch_with_new_rows().items()}
    weights = [{n: whole(p).detach().clone() for n, p in model.named_parameters()}]
    measured = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        total(model, batch).backward()
        rows.before_step(step)
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rows.after_step(step)
        measured.append(rows.measure(step))
        weights.append({n: whole(p).detach().clone() for n, p in model.named_parameters()})
    return rows, optimizer, weights, measured


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name which rows (or numbers) of a weight are not what they were, where there are any."""
    moved = {
        name: (tensor != after[name]).reshape(len(tensor), -1).any(1)
        for name, tensor in before.items()
    }
    return {name: rows for name, rows in moved.items() if rows.any()}


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_tied(tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize("kind", ["two matrices", "tied", "adapters"])
def test_at_first_nothing_but_the_new_rows_moves(tied, kind):
    folder, spec = BASE, spec_of(BASE)
    if kind == "tied":
        folder, spec = tied, spec_of(tied, TIED)
    elif kind == "adapters":
        spec = spec | LORA
    model = make(folder, spec)
    if kind == "adapters":
        models.freeze(model, ["^layers[.](?!.*lora_)", "^norm[.]"])
    matrices = {"tok_embeddings.weight"} | ({"output.weight"} if kind != "tied" else set())
    _, optimizer, weights, _ = train(model, FIRST, STEPS)
    moved = changed(weights[0], weights[FIRST])
    assert moved.keys() == matrices
    for name, rows in moved.items():
        assert not rows[: IDS.start].any() and not rows[IDS.stop :].any(), name
        assert rows[IDS].all() or name != "output.weight"
    # then all that trains does, decay included, and every old row
    after = changed(weights[FIRST], weights[FIRST + 1])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    still = {name for name in trained if name.endswith("lora_a.weight")}  # lora_b was 0 so far
    assert after.keys() >= trained - still and matrices < after.keys()
    assert all(after[name].sum() >= 942 for name in matrices)  # one row is 0 and not in the batch
    # the optimizer knows the size of the held rows' gradients, and begins with the others
    for name, parameter in model.named_parameters():
        if name in trained:
            state = optimizer.state[parameter]
            assert state["step"] == (STEPS if name in matrices else STEPS - FIRST)
    head = model.tok_embeddings.weight if kind == "tied" else model.output.weight
    assert (optimizer.state[head]["exp_avg_sq"][: IDS.start] > 0).all()


@pytest.mark.parametrize("first", [0, FIRST])
def test_of_both_matrices_the_new_rows_alone_move_in_all_steps(first):
    model = make(BASE, spec_of(BASE) | LORA)
    models.freeze(model, ["^layers[.](?!.*lora_)", "^norm[.]"])
    _, _, weights, _ = train(model, first, STEPS, only=True)
    moved = changed(weights[0], weights[STEPS])
    for name in ("tok_embeddings.weight", "output.weight"):
        rows = moved.pop(name)
        assert rows[IDS].any() and rows.sum() == rows[IDS].sum(), name
    assert moved and all("lora_" in name for name in moved)
    # the old rows are no part of the gradient's norm
    rows = NewRows(model, LAYOUT, only=True)
    total(model, batch_with_new_rows()).backward()
    rows.before_step(1)
    gradient = model.output.weight.grad
    assert gradient[IDS].any() and not gradient[: IDS.start].any()
    assert not gradient[IDS.stop :].any()


def test_without_first_steps_the_training_is_the_plain_one():
    model, plain = make(BASE), make(BASE)
    _, _, weights, _ = train(model, 0, 2)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        total(plain, batch_with_new_rows()).backward()
        clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert changed(dict(plain.named_parameters()), weights[-1]) == {}


def test_old_rows_stay_and_are_not_held_on_to(tied):
    """A step that is left out (a guard's) leaves them too; copies are dropped after the last."""
    model = make(BASE)
    rows = NewRows(model, LAYOUT, 2)
    for step in (1, 2, 3):
        total(model, batch_with_new_rows()).backward()
        rows.before_step(step)
        assert all((matrix.frozen is not None) == (step < 3) for matrix in rows._own)
        rows.after_step(step)
    assert all(matrix.frozen is None for matrix in rows._own)


def test_rows_that_moved_are_counted():
    model = make(BASE)
    rows = NewRows(model, LAYOUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    batch = batch_with_new_rows()
    assert rows.measure(1) == {"embedding_moved": 0, "head_moved": 0}
    total(model, batch).backward()
    rows.before_step(1)
    optimizer.step()
    rows.after_step(1)
    # of the embedding only what was in the batch, of the head all
    ids = set(batch["tokens"][:, :19].flatten().tolist()) & set(LAYOUT.ids)  # without padding
    assert 3 <= len(ids) < len(LAYOUT.ids)
    assert rows.measure(1) == {"embedding_moved": len(ids), "head_moved": len(LAYOUT.ids)}
    assert rows.measure(WATCHED + 1) == {}


def test_first_steps_that_would_train_nothing_are_refused():
    model = make(BASE)
    for keys in ((5, False), (0, True)):
        with pytest.raises(ValueError, match=r"new_rows_only=.*, but the checkpoint has no sound"):
            NewRows(model, None, *keys)
    models.freeze(model, ["^tok_embeddings", "^output"])
    with pytest.raises(ValueError, match="freeze holds embedding and head"):
        NewRows(model, LAYOUT, 5)
    rows = NewRows(make(BASE), None)
    rows.before_step(1)
    rows.after_step(1)
    assert rows.measure(1) == {} and rows.verdict([{"step": 1}]) is None


def rank_main(folder: Path) -> None:
    """What each of two ranks does: its half of every batch, on models sharded in two ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, source, spec, options in (
        ("fsdp", BASE, spec_of(BASE), {}),
        ("copies", folder / "tied", spec_of(folder / "tied", TIED), {"shard_group": 1}),
        ("only", BASE, spec_of(BASE), {}),
    ):
        model = make(source, spec, **options)
        _, _, weights, measured = train(
            model, FIRST, STEPS, slice(rank, None, 2), only=name == "only"
        )
        torch.save({"weights": weights, "measured": measured}, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_do_what_one_does(tmp_path):
    """FSDP2 with the new rows on both ranks, and two copies (HSDP)."""
    tied = make_tied(tmp_path / "tied")
    on_two_ranks(rank_main, tmp_path)
    for name, folder, spec in (
        ("fsdp", BASE, spec_of(BASE)),
        ("copies", tied, spec_of(tied, TIED)),
        ("only", BASE, spec_of(BASE)),
    ):
        _, _, weights, measured = train(make(folder, spec), FIRST, STEPS, only=name == "only")
        ranks = [torch.load(tmp_path / f"{name}-{r}.pt", weights_only=True) for r in (0, 1)]
        assert ranks[0]["measured"] == ranks[1]["measured"], "every rank says the same"
        assert ranks[0]["measured"] == measured and all(measured)
        for number in (FIRST, STEPS):
            torch.testing.assert_close(
                ranks[1]["weights"][number], weights[number], atol=2e-3, rtol=1e-3
            )
        still = STEPS if name == "only" else FIRST
        moved = changed(ranks[0]["weights"][0], ranks[0]["weights"][still])
        matrices = {"tok_embeddings.weight", "output.weight"}
        assert moved.keys() <= matrices or name == "only"
        for rows in (moved[matrix] for matrix in matrices & moved.keys()):
            assert rows[IDS].any() and rows.sum() == rows[IDS].sum(), "old rows stay to the bit"


def line(step: int, loss: float | None, moved: float = 19.0, **more: Any) -> dict[str, Any]:
    counts = {"embedding_moved": moved, "head_moved": moved}
    return {"step": step, **counts, **({} if loss is None else {"loss_sound": loss}), **more}


def test_the_verdict_says_in_words_what_the_lines_say():
    rows = NewRows(make(BASE), LAYOUT)

    def of(losses: list, **more: Any) -> str:
        return rows.verdict([line(i + 1, loss, **more) for i, loss in enumerate(losses)]) or ""

    fall = [9 - 0.08 * i for i in range(WATCHED)]
    assert "100 steps: they learn: the loss of sound tokens went from 8.64 to 1.44" in of(fall)
    assert "ln(16) = 2.77" in of(fall)
    assert "begin to learn: the loss of sound tokens went from 8.82 to 5.22" in of(
        [9 - 0.04 * i for i in range(WATCHED)]
    )
    assert "do NOT learn: the loss of sound tokens went from 9.00 to 9.00" in of([9.0] * WATCHED)
    assert "have learned before" in of([1.0] * WATCHED)
    assert "do NOT learn: not one row of embedding and head has moved" in of(fall, moved=0.0)
    assert "no target was a sound token" in of([None] * WATCHED)
    # only the first steps count, and not what was in quarantine
    worse = [line(i + 1, fall[i]) for i in range(WATCHED)]
    worse[50] |= {"loss_sound": 1e6, "quarantined": "loss"}
    worse += [line(WATCHED + 1, 50.0)]
    assert rows.verdict(worse) == of(fall)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plain", "they learn"),
        ("frozen", "NOT learn: not one row of embedding and head has"),
        ("lost in bf16", "NOT learn: not one row of head has"),
        ("no rate", "do NOT learn: the loss"),
    ],
)
def test_the_verdict_on_real_trainings(tmp_path, kind, words):
    """Codes that follow a rule, from rows that are all the mean of the old ones."""
    name = {"_component_": "speechfuse.tokens.mean"}
    layout = expansion.expand(BASE, tmp_path / "expanded", 16, "", 0, name)
    dtype = "bf16" if kind == "lost in bf16" else "fp32"
    spec = spec_of(tmp_path / "expanded")
    model = built(tmp_path / "expanded", spec, dtype=dtype, compute_dtype=dtype)
    if kind == "frozen":
        models.freeze(model, ["^tok_embeddings", "^output"])
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = {"lost in bf16": 1e-7, "no rate": 1e-7}.get(kind, 5e-3)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rows, lines = NewRows(model, layout), []
    codes = torch.arange(25) * 3 + torch.arange(2)[:, None]
    ids = layout.first + codes % 16
    batch = {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "input_pos": torch.arange(24).repeat(2, 1),
        "mask": attention.mask_of(torch.zeros(2, 24), "dense"),
        "sound": torch.ones(2, 24, dtype=torch.bool),
    }
    for step in range(1, 21 if kind == "plain" else 5):
        optimizer.zero_grad()
        loss = total(model, batch) / 48
        loss.backward()
        rows.before_step(step)
        optimizer.step()
        rows.after_step(step)
        lines.append({"step": step, "loss_sound": float(loss.detach()), **rows.measure(step)})
    verdict = rows.verdict(lines)
    assert verdict and words in verdict, verdict
