"""The optimizer's groups and the course of the learning rate, against HF Trainer's."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

import minilora
from minilora import LoraConfig, MiniloraError, TrainConfig
from minilora.training.optim import (
    build_optimizer,
    build_scheduler,
    check_optimizer,
    check_scheduler,
)
from tests.conftest import tiny_classifier


def groups_by_name(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        (group["weight_decay"], [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"modules_to_save": ["LayerNorm"]}])
def test_the_two_groups_are_trainers(settings, tmp_path):
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", **settings))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True
    )
    expected = Trainer(model, arguments).create_optimizer()
    found = build_optimizer(model, TrainConfig(weight_decay=0.1))
    assert groups_by_name(model, found) == groups_by_name(model, expected)


def test_both_groups_exist_even_when_one_is_empty():
    optimizer = build_optimizer(nn.Linear(2, 2, bias=False), TrainConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]


@pytest.mark.parametrize("warmup", [0, 3, 0.25, 100])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_every_learning_rate_of_a_run_is_transformers(schedule, warmup):
    steps = 11

    def course(build):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
        scheduler, rates = build(optimizer), []
        for _ in range(steps + 2):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return rates, scheduler.state_dict()

    def theirs(optimizer):
        arguments = TrainingArguments(output_dir="unused", warmup_steps=warmup, use_cpu=True)
        warmup_steps = 0 if schedule == "constant" else arguments.get_warmup_steps(steps)
        return get_scheduler(schedule, optimizer, warmup_steps, steps)

    config = TrainConfig(lr_scheduler_type=schedule, warmup_steps=warmup)
    rates, state = course(lambda optimizer: build_scheduler(optimizer, config, steps))
    expected_rates, expected_state = course(theirs)
    assert rates == expected_rates
    assert state.keys() == expected_state.keys()


@pytest.mark.parametrize("numbers", [5, "x", [], [1], [True], torch.zeros(1), {0: 0}])
def test_groups_that_do_not_number_the_parameters_are_refused(numbers, tmp_path):
    optimizer = build_optimizer(nn.Linear(2, 2, bias=False), TrainConfig())
    state = optimizer.state_dict()
    check_optimizer(optimizer, state, tmp_path)
    state["param_groups"][0]["params"] = numbers
    with pytest.raises(MiniloraError, match="params"):
        check_optimizer(optimizer, state, tmp_path)


@pytest.mark.parametrize("position", [1.5, 1e308, 2**63, None])
def test_a_schedules_position_is_a_whole_number(position, tmp_path):
    optimizer = build_optimizer(nn.Linear(2, 2), TrainConfig())
    scheduler = build_scheduler(optimizer, TrainConfig(), 3)
    check_scheduler(scheduler, scheduler.state_dict(), tmp_path)
    with pytest.raises(MiniloraError, match="last_epoch is"):
        check_scheduler(scheduler, {**scheduler.state_dict(), "last_epoch": position}, tmp_path)
