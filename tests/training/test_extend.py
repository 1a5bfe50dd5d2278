"""--extend: a run goes on to a later end, and says so."""

import pytest

from minilora import MiniloraError, TrainConfig, fine_tune, inspect_directory
from minilora.fine_tuning import run_fine_tuning
from minilora.training.record import RunRecord
from tests.conftest import read_rows
from tests.training.test_resume import STEPS_PER_EPOCH, arguments, assert_same_run, stop_at


def train(tiny_model, sentences, output_dir, **changes) -> None:
    values = arguments(tiny_model, sentences, save_strategy="epoch", **changes)
    fine_tune(TrainConfig(**values, output_dir=str(output_dir)))


def extend(output_dir, **values):
    return fine_tune(TrainConfig(resume_from_checkpoint=str(output_dir), extend=True, **values))


def test_with_a_constant_rate_an_extended_run_is_the_longer_run(tmp_path, tiny_model, sentences):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(tiny_model, sentences, whole, num_train_epochs=4, lr_scheduler_type="constant")
    train(tiny_model, sentences, run, num_train_epochs=1, lr_scheduler_type="constant")
    extend(run, num_train_epochs=2)
    extend(run, num_train_epochs=4)
    assert_same_run(run, whole)
    assert RunRecord.read(run).extended == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_from_there_on_the_rate_is_the_longer_schedules(tmp_path, tiny_model, sentences, schedule):
    whole, run = tmp_path / "whole", tmp_path / "run"
    how = {"lr_scheduler_type": schedule, "warmup_steps": 0.2, "num_train_epochs": -1}
    train(tiny_model, sentences, whole, max_steps=9, **how)
    train(tiny_model, sentences, run, max_steps=5, **how)
    result = extend(run, max_steps=9)
    assert result.global_step == 9
    rates = [[row["learning_rate"] for row in read_rows(p) if "loss" in row] for p in (whole, run)]
    assert rates[0][5:] == rates[1][5:] and rates[0][:5] != rates[1][:5]


def test_an_extended_run_resumes_exactly_even_if_killed_before_it_saved(
    tmp_path, tiny_model, sentences
):
    """The same command, or one that names nothing but the directory."""
    runs = [tmp_path / name for name in ("whole", "killed", "again")]
    for run in runs:
        train(tiny_model, sentences, run, num_train_epochs=1)
    extend(runs[0], num_train_epochs=3)
    for run, arguments_again in zip(
        runs[1:], ({}, {"extend": True, "num_train_epochs": 3}), strict=True
    ):
        asked = {"resume_from_checkpoint": str(run), "extend": True, "num_train_epochs": 3}
        with pytest.raises(KeyboardInterrupt):
            run_fine_tuning(asked, {}, interrupt_at(4))
        assert not (run / f"checkpoint-{STEPS_PER_EPOCH + 3}").exists()
        run_fine_tuning({"resume_from_checkpoint": str(run), **arguments_again}, {}, lambda: False)
        assert_same_run(run, runs[0])
        assert RunRecord.read(run).extended == [STEPS_PER_EPOCH]


def interrupt_at(count: int):
    calls = iter(range(1, 1000))

    def should_stop() -> bool:
        if next(calls) == count:
            raise KeyboardInterrupt
        return False

    return should_stop


def test_a_run_in_its_midst_is_extended_too(tmp_path, tiny_model, sentences):
    stop_at(3, arguments(tiny_model, sentences), tmp_path / "run")
    extend(tmp_path / "run", num_train_epochs=3)
    assert RunRecord.read(tmp_path / "run").extended == [3]
    losses = [row["step"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert losses == list(range(1, 3 * STEPS_PER_EPOCH + 1))


def test_inspect_tells_of_it(tmp_path, tiny_model, sentences):
    train(tiny_model, sentences, tmp_path / "run", num_train_epochs=1)
    extend(tmp_path / "run", num_train_epochs=2)
    assert inspect_directory(tmp_path / "run")["position"]["extended"] == [STEPS_PER_EPOCH]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"num_train_epochs": 0.5}, "ends by num_train_epochs 1.*give --num_train_epochs above"),
        ({"max_steps": 100}, "ends by num_train_epochs 1"),
        ({"num_train_epochs": 2, "learning_rate": 1.0}, "learning_rate: 0.003 -> 1.0"),
    ],
)
def test_what_is_no_later_end_is_refused(tmp_path, tiny_model, sentences, values, fault):
    train(tiny_model, sentences, tmp_path / "run", num_train_epochs=1)
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(MiniloraError, match=fault):
        extend(tmp_path / "run", **values)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_the_flag_alone_is_refused(tmp_path, tiny_model, sentences, command):
    train(tiny_model, sentences, tmp_path / "run", num_train_epochs=1)
    done = command("train", "--resume_from_checkpoint", tmp_path / "run", "--extend")
    assert done.code == 2 and "give --num_train_epochs above it" in done.err


def test_without_the_flag_a_later_end_is_refused_and_the_flag_is_named(
    tmp_path, tiny_model, sentences
):
    train(tiny_model, sentences, tmp_path / "run", num_train_epochs=1)
    with pytest.raises(MiniloraError, match="num_train_epochs: 1.* -> 2.*--extend trains longer"):
        fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run"), num_train_epochs=2))


def test_a_run_that_stopped_early_or_does_not_exist_is_not_extended(
    tmp_path, tiny_model, sentences
):
    with pytest.raises(MiniloraError, match="extend is for a run that is resumed"):
        TrainConfig(extend=True)
    how = {"early_stopping_patience": 1, "learning_rate": 0.0, "num_train_epochs": 5}
    train(tiny_model, sentences, tmp_path / "run", **how)
    with pytest.raises(MiniloraError, match="stopped early"):
        extend(tmp_path / "run", num_train_epochs=9)
