"""The loop on a model small enough to compute by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from minilora import MiniloraError, Timetable, TrainConfig, Training, TrainState
from minilora.training.evaluation import evaluate_model
from minilora.training.loop import Callbacks, fit, loss_shares, training_step
from minilora.training.optim import build_scheduler


class Line(nn.Module):
    """Batch to one number an example."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 1)
        self.weight, self.bias = self.linear.weight, self.linear.bias

    def forward(self, batch):
        return self.linear(batch["x"]).squeeze(-1)


class Regression:
    """A task with the least that the loop asks of one."""

    def training_loss(self, logits, batch):
        return nn.functional.mse_loss(logits, batch["labels"])

    loss = training_loss

    def loss_weight(self, batch):
        return len(batch["labels"])


class Count:
    """A scorer that only counts."""

    def __init__(self):
        self.count = 0

    def add(self, logits, batch):
        self.count += len(logits)

    def metrics(self):
        return {"count": self.count}


def linear(seed=0):
    return Line(seed)


def batch_of(examples, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(examples, 3, generator=draw),
        "labels": torch.randn(examples, generator=draw),
        "example": torch.arange(examples),
    }


CONSTANT = TrainConfig(lr_scheduler_type="constant")


def step(model, batches, max_grad_norm=0.0, number=1, scaler=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = build_scheduler(optimizer, CONSTANT, 1)
    training = Training(model, optimizer, scheduler, task=Regression())
    training.state.global_step = number - 1
    if scaler is not None:
        training.scaler = scaler
    config = TrainConfig(max_grad_norm=max_grad_norm)
    return training_step(training, config, batches)


def test_accumulating_batches_equals_one_batch_of_all_their_examples():
    """Also when the last one is smaller: the mean is over examples, not over batches."""
    parts = [batch_of(4, 1), batch_of(4, 2), batch_of(1, 3)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    one, other = linear(), linear()
    (losses, norm), (expected, expected_norm) = step(one, parts), step(other, [whole])
    assert sum(losses) == pytest.approx(sum(expected), rel=1e-6)
    assert norm == pytest.approx(expected_norm, rel=1e-6)
    torch.testing.assert_close(one.weight, other.weight)


def test_trainers_shares_do_not_divide():
    batches = [batch_of(4, 1), batch_of(1, 2)]
    assert loss_shares(Regression(), TrainConfig(hf_parity=True), batches) == [1.0, 1.0]
    assert loss_shares(Regression(), TrainConfig(), batches) == [0.8, 0.2]


def test_gradients_are_clipped_to_the_norm():
    one, other = linear(), linear()
    start = one.weight.detach().clone(), one.bias.detach().clone()
    _, norm = step(one, [batch_of(4, 1)], max_grad_norm=0.01)
    step(other, [batch_of(4, 1)])
    assert norm > 0.01
    moved = [torch.cat([(m.weight - start[0]).flatten(), m.bias - start[1]]) for m in (one, other)]
    assert moved[0].norm().item() == pytest.approx(0.1 * 0.01, rel=1e-4)
    torch.testing.assert_close(moved[0] / moved[0].norm(), moved[1] / moved[1].norm())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_it(bad):
    model, batch = linear(), batch_of(4, 1)
    batch["x"][0, 0] = bad
    before = model.weight.detach().clone()
    with pytest.raises(MiniloraError, match=r"step 17: the loss is (nan|inf)"):
        step(model, [batch], number=17)
    assert torch.equal(model.weight, before)


def test_a_scaled_step_is_the_unscaled_one_and_an_overflow_is_skipped():
    """The scale is a power of two, so that scaling and unscaling lose no bit."""
    one, other, batch = linear(), linear(), batch_of(4, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    (losses, norm), expected = step(one, [batch], 0.5, scaler=scaler), step(other, [batch], 0.5)
    assert (losses, norm) == expected and torch.equal(one.weight, other.weight)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    batch["labels"] *= 100
    _, norm = step(one, [batch], scaler=scaler)
    assert not math.isfinite(norm) and torch.equal(one.weight, other.weight)
    assert scaler.get_scale() == 2.0**126


def run(timetable=None, config=None, epochs=2, evaluations=None, stop_after=None, state=None):
    """Fit 5 steps an epoch; returns (state, rows, saved steps)."""
    settings = {
        "max_steps": 5 * epochs, "steps_per_epoch": 5, "batches_per_epoch": 5, "logging_steps": 2,
        "eval_each_epoch": True, "save_each_epoch": True,
    }  # fmt: skip
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = Training(
        model,
        optimizer,
        build_scheduler(optimizer, CONSTANT, 1),
        task=Regression(),
        timetable=Timetable(**{**settings, **(timetable or {})}),
        state=state or TrainState(),
    )
    state, rows, saved = training.state, [], []
    scores = iter(evaluations or [])
    callbacks = Callbacks(
        batches=lambda epoch, skip: ([batch_of(4, 10 * epoch + i)] for i in range(skip, 5)),
        evaluate=(lambda: {"eval_score": next(scores)}) if evaluations else None,
        log=rows.append,
        save=lambda: saved.append((state.global_step, len(rows))),
        should_stop=lambda: stop_after is not None and state.global_step >= stop_after,
        progress=lambda *_: None,
    )
    fit(training, TrainConfig(**(config or {})), callbacks)
    return state, rows, [step for step, _ in saved]


def test_rows_hold_the_mean_loss_since_the_last_one():
    state, rows, _ = run({"logging_steps": 1})
    losses = [row["loss"] for row in rows]
    _, by_two, _ = run({"logging_steps": 2})
    for index, row in enumerate(by_two):
        assert row["loss"] == pytest.approx(np.mean(losses[2 * index : 2 * index + 2]))
    assert [row["step"] for row in by_two] == [2, 4, 6, 8, 10]
    assert (state.epoch, state.step_in_epoch, state.global_step) == (2, 0, 10)


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({}, [5, 10]),
        ({"max_steps": 7}, [5, 7]),
        ({"save_each_epoch": False, "save_steps": 3}, [3, 6, 9, 10]),
        ({"save_each_epoch": False, "save_steps": 5}, [5, 10]),
        ({"save_steps": 1, "max_steps": 3}, [1, 2, 3]),
        ({"save_each_epoch": False}, []),
    ],
)
def test_checkpoints_come_when_they_are_due_and_once_each(changes, saved):
    assert run(changes)[2] == saved


def test_a_requested_stop_saves_unless_that_step_is_saved_already():
    assert run({}, stop_after=3)[2] == [3]
    assert run({}, stop_after=5)[2] == [5]
    assert run({"save_each_epoch": False, "save_steps": 3}, stop_after=3)[2] == [3]
    assert run({}, stop_after=0)[2] == []


BEST = {"metric_for_best_model": "score", "greater_is_better": True}


def test_the_best_metric_is_remembered_with_its_step():
    state, _, _ = run(config=BEST, epochs=4, evaluations=[1, 3, 3, 2])
    assert (state.best_metric, state.best_step) == (3, 10)
    smallest = {**BEST, "greater_is_better": False}
    assert run(config=smallest, epochs=4, evaluations=[3, 1, 2, 1])[0].best_step == 10


def test_a_metric_that_is_no_number_is_never_the_best():
    """It could not be written down, and nothing is greater than it."""
    state, _, _ = run(config=BEST, epochs=3, evaluations=[math.nan, 2, math.nan])
    assert (state.best_metric, state.best_step) == (2, 10)
    assert run(config=BEST, epochs=1, evaluations=[math.inf])[0].best_metric is None


def test_early_stopping_counts_evaluations_without_a_better_one():
    config = {**BEST, "early_stopping_patience": 2}
    state, _, saved = run(config=config, epochs=9, evaluations=[1, 2, 1, 2, 9, 9, 9])
    assert state.stopped_early and state.global_step == 20 and saved[-1] == 20


def test_a_metric_that_is_not_computed_is_refused_with_those_that_are():
    with pytest.raises(MiniloraError, match="there is no eval_other; computed are eval_score"):
        run(config={"metric_for_best_model": "other"}, evaluations=[1, 2])


def test_an_evaluation_that_the_first_version_left_pending_comes_first():
    """It could save between the last step of an epoch and its evaluation."""
    pending = TrainState(global_step=5, step_in_epoch=5, logged_step=4)
    state, rows, saved = run(evaluations=[7, 8], state=pending)
    assert [(row["step"], row["eval_score"]) for row in rows if "eval_score" in row] == [
        (5, 7), (10, 8)
    ]  # fmt: skip
    assert saved == [10] and (state.epoch, state.step_in_epoch) == (2, 0)


def test_evaluation_counts_every_example_once_and_restores_the_mode():
    model = linear()
    model.dropout = nn.Dropout(0.5).eval()  # a module the user keeps in eval mode
    batches, task, scorer = [batch_of(4, 1), batch_of(1, 2)], Regression(), Count()
    before = torch.get_rng_state()
    found = evaluate_model(model, task, False, iter(batches), scorer, "eval")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.dropout.training and model.linear.training
    losses = [task.loss(model(batch), batch) for batch in batches]
    expected = (4 * losses[0] + losses[1]) / 5
    assert found["eval_count"] == 5
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert list(found)[-3:] == [
        "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"
    ]  # fmt: skip
