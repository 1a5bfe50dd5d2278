"""TrainConfig: what is refused, what a record of it means, what a resume may change."""

import dataclasses
from pathlib import Path

import pytest

from minilora import MiniloraError, TrainConfig
from minilora.training.config import TASKS, reconcile, train_config_from_dict


def test_every_task_has_a_file_of_its_own():
    from tests.conftest import task_of

    assert {"sequence_classification", "regression"} <= set(TASKS)
    for name in TASKS:
        assert task_of(name, labels=["a", "b"]).name == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_steps": 1.5}, "max_steps is 1.5; it must be of type int"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0; it must be in [0, 1)"),
        ({"adam_epsilon": 0.0}, "adam_epsilon is 0.0; it must be above 0"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0; it must be above 0"),
        (
            {"hf_parity": True, "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
            "needs gradient_accumulation_steps 1",
        ),
        ({"label_all_tokens": True}, "is for token_classification, not sequence_classification"),
        ({"task": "translation"}, "task is 'translation'; it must be one of"),
        ({"validation_split": 0.1, "validation_file": "v"}, "both given: leave one out"),
        (
            {"task": "regression", "label_smoothing_factor": 0.1},
            "label_smoothing_factor is for sequence_classification",
        ),
        ({"hf_parity": True, "batching": "packed"}, "hf_parity needs batching padded, not packed"),
        ({"hf_parity": True, "gradient_checkpointing": True}, "gradient_checkpointing False"),
        ({"torch_compile": True, "dropout": "fast"}, "torch_compile needs dropout torch, not fast"),
        ({"eval_strategy": "no", "metric_for_best_model": "f1"}, "eval_f1 is asked to rank"),
        ({"metric_for_best_model": "runtime"}, "must not be a timing"),
        ({"metric_for_best_model": "eval_samples_per_second"}, "must not be a timing"),
        ({"metric_for_best_model": "steps_per_second"}, "must not be a timing"),
        ({"seed": 2**32}, "seed is 4294967296; it must be in [0, 4294967296)"),
        ({"device": "mps"}, "device is 'mps'; it must be cpu, cuda, cuda:1"),
        ({"train_file": "a\0b"}, "train_file is 'a\\x00b'; it must be of type"),
        ({"output_dir": "\udce9"}, "it must be of type"),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "make them the same"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(settings, message):
    with pytest.raises(MiniloraError) as refused:
        TrainConfig(**settings)
    assert message in str(refused.value)


STEPS = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("eval_steps", "save_steps", "fits"),
    [(500, 250, True), (500, 300, False), (4, 2, True), (4, 3, False), (4, 0, False)],
)
def test_the_best_model_needs_a_checkpoint_at_each_evaluation(eval_steps, save_steps, fits):
    try:
        TrainConfig(**STEPS, eval_steps=eval_steps, save_steps=save_steps)
    except MiniloraError as error:
        assert not fits and "save_steps" in str(error)
    else:
        assert fits


def test_a_record_is_read_as_it_was_written():
    config = TrainConfig(max_steps=3, logging_steps=7, eval_steps=9, text_column="0")
    assert train_config_from_dict(dataclasses.asdict(config), "run.json") == config


def test_an_older_record_without_eval_steps_evaluated_as_often_as_it_logged():
    recorded = {**dataclasses.asdict(TrainConfig()), "logging_steps": 7, "eval_steps": None}
    assert train_config_from_dict(recorded, "run.json").eval_steps == 7


@pytest.mark.parametrize("recorded", [{"shuffle": True}, {"max_steps": "3"}, {"seed": -1}])
def test_a_record_that_cannot_be_is_refused_by_its_place(recorded):
    with pytest.raises(MiniloraError, match=f"^run.json: .*{next(iter(recorded))}"):
        train_config_from_dict(recorded, "run.json")


def test_a_resume_may_change_only_what_no_number_depends_on():
    recorded = TrainConfig(learning_rate=0.1, seed=1)
    free = {"output_dir": "elsewhere", "save_steps": 3, "train_file": "moved.tsv", "seed": 1}
    assert reconcile(recorded, free) == dataclasses.replace(recorded, **free)
    with pytest.raises(MiniloraError, match="learning_rate: 0.1 -> 0.2, seed: 1 -> 2: leave"):
        reconcile(recorded, {**free, "learning_rate": 0.2, "seed": 2})


def test_the_best_metric_is_the_loss_unless_another_is_named():
    assert TrainConfig().best_metric() is None
    assert TrainConfig(early_stopping_patience=1).best_metric() == "eval_loss"
    assert not TrainConfig(early_stopping_patience=1).best_is_greatest()
    named = TrainConfig(metric_for_best_model="f1")
    assert named.best_metric() == "eval_f1" and named.best_is_greatest()
    assert not TrainConfig(metric_for_best_model="mse").best_is_greatest()
    assert TrainConfig(metric_for_best_model="mse", greater_is_better=True).best_is_greatest()


def test_a_path_is_as_good_as_its_name():
    assert TrainConfig(output_dir=Path("out")) == TrainConfig(output_dir="out")  # pyright: ignore
