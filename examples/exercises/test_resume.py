"""Exercise 4: your run against itself, killed at every step and started again.

Each run is in a process of its own. Its generators stand somewhere else when it begins, as in any
new process: what your `train` does not seed or restore is not what it was.
"""

import functools
import random
import tempfile
from pathlib import Path

import ex4_given as given
import numpy as np
import pytest
import torch
from answers.ex4_resume import epoch_order, train
from processes import Ended, in_a_process, kill_in_save, kill_this_process, scatter_generators

WHAT_IT_MEANS = {
    "examples": "the position in the epoch, or the epoch, was not restored, or the order is not a "
    "function of SEED and the epoch alone",
    "learning_rate": "the scheduler's state was not restored, or the optimizer's, which holds the "
    "rate; or that was loaded before LambdaLR was built, which sets the rate to that of step 0",
    "loss": "the parameters, those of the frozen layer included, or a generator is not where it "
    "was. Restored too early? Whatever is built afterwards draws again",
    "mean_loss": "the sum of the losses since the last mean was not saved",
}
MOMENTS = "the optimizer's moments were not restored: the first update after the resume is another"


def run(directory: Path, kill_at: int = 0, in_save: int = 0) -> Ended:
    """`train(directory)` in another process: its rows, then parameters and next draws."""

    def work(report) -> None:
        scatter_generators()
        kill_in_save(in_save)

        def tell(row) -> None:
            report(row)
            if row["step"] == kill_at:
                kill_this_process()

        model = train(directory, tell)
        report({name: p.detach().numpy().copy() for name, p in model.named_parameters()})
        report((random.random(), np.random.rand(), torch.rand(1).item()))

    return in_a_process(work)


def finished(directory: Path) -> tuple[list[dict], dict, tuple]:
    """(rows, parameters, draws) of a run that is left alone."""
    ended = run(directory)
    assert not ended.error, f"train raised\n{ended.error}"
    assert not ended.killed, "train was still at it after a minute: does its position advance?"
    return ended.told[:-2], *ended.told[-2:]


def assert_resumes(directory: Path, first: int) -> None:
    """`train` goes on in `directory` with step `first`, and ends as the whole run did."""
    (rows, parameters, draws), whole = finished(directory), whole_run()
    steps = [row["step"] for row in rows]
    assert steps == list(range(first, given.TOTAL_STEPS + 1)), (
        f"the last checkpoint is of step {first - 1}; the resumed run took the steps {steps}. Is "
        "the number of steps that are taken saved with the parameters that have taken them?"
    )
    for row, expected in zip(rows, whole[0][first - 1 :], strict=True):
        for key, meaning in WHAT_IT_MEANS.items():
            is_moments = key == "loss" and row["step"] > first
            assert row[key] == expected[key], (
                f"resumed with step {first}; at step {row['step']} {key} is {row[key]}, in the run "
                f"that was never killed {expected[key]}: {MOMENTS if is_moments else meaning}"
            )
    wrong = [name for name in parameters if not np.array_equal(parameters[name], whole[1][name])]
    assert not wrong, f"resumed with step {first}, {wrong} end in other bits: {MOMENTS}"
    assert draws == whole[2], (
        f"python, numpy and torch draw {draws} next, and not {whole[2]}: a generator is elsewhere"
    )


@functools.cache
def whole_run() -> tuple[list[dict], dict, tuple]:
    """The run that is never killed."""
    with tempfile.TemporaryDirectory() as directory:
        return finished(Path(directory))


def test_the_order_of_an_epoch_is_a_function_of_the_epoch():
    first, state = epoch_order(0), torch.get_rng_state()
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()
    assert sorted(first) == list(range(given.EXAMPLES)), "every example once: 0 to EXAMPLES - 1"
    assert epoch_order(1) != first, "every epoch has the same order"
    assert epoch_order(0) == first, "asked again, epoch 0 has another order: it depends on the past"
    untouched = torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    assert untouched and numpy == np.random.get_state()[1].tolist(), (
        "it draws from a global generator; use torch.Generator().manual_seed(SEED + epoch)"
    )


def test_the_run_that_is_left_alone(tmp_path):
    rows, parameters, _ = whole_run()
    assert [row["step"] for row in rows] == list(range(1, given.TOTAL_STEPS + 1))
    order = [index for epoch in range(given.EPOCHS) for index in epoch_order(epoch)]
    assert [index for row in rows for index in row["examples"]] == order, "not epoch_order's order"
    assert [len(row["examples"]) for row in rows] == [4, 4, 3] * given.EPOCHS
    rates = [given.LEARNING_RATE * given.share_of_peak(step) for step in range(given.TOTAL_STEPS)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates), "not the schedule's"
    for row in rows:
        losses = [other["loss"] for other in rows[max(0, row["step"] - 4) : row["step"]]]
        mean = None if row["step"] % given.LOGGING_STEPS else sum(losses) / len(losses)
        assert row["mean_loss"] == (mean and pytest.approx(mean)), f"mean_loss in {row}"
    torch.manual_seed(given.SEED)
    fresh = given.Model().state_dict()
    still = [name for name in fresh if np.array_equal(fresh[name].numpy(), parameters[name])]
    assert still == ["base_layer.weight", "base_layer.bias"], f"seed first; what stayed: {still}"
    assert finished(tmp_path)[0] == rows, (
        "two runs that nobody kills differ: seed python, numpy and torch before the model is built"
    )


@pytest.mark.parametrize("step", range(1, given.TOTAL_STEPS + 1))
def test_killed_at_a_step_it_ends_in_the_same_bits(step, tmp_path):
    killed = run(tmp_path, kill_at=step)
    assert not killed.error, killed.error
    saved = (step - 1) // given.SAVE_STEPS * given.SAVE_STEPS
    assert_resumes(tmp_path, first=saved + 1)


def test_killed_again_and_again_it_ends_in_the_same_bits(tmp_path):
    for step in (3, 5, 8):
        assert not (ended := run(tmp_path, kill_at=step)).error, ended.error
    assert_resumes(tmp_path, first=7)


@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_it_saves_it_goes_on_from_the_save_before(number, tmp_path):
    ended = run(tmp_path, in_save=number)
    assert not ended.error, ended.error
    assert ended.killed, "no torch.save of yours was met: the test kills the process inside of it"
    try:
        assert_resumes(tmp_path, first=(number - 1) * given.SAVE_STEPS + 1)
    except AssertionError as error:
        raise AssertionError(f"half a checkpoint bears the name of a whole one: {error}") from error


def test_a_run_that_has_ended_takes_no_step(tmp_path):
    _, parameters, _ = finished(tmp_path)
    rows, again, _ = finished(tmp_path)
    assert rows == [], f"called again after the end it took {len(rows)} steps: save after the last"
    assert all(np.array_equal(again[name], parameters[name]) for name in parameters)
