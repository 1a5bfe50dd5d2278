"""The optimizer's groups and the course of the learning rate, against HF Trainer's."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
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


LORAPLUS = {
    "default": {},
    "bias all": {"bias": "all"},
    "heads with norms": {"modules_to_save": ["pooler", "LayerNorm"]},
    "embeddings": {"target_modules": ["query", "word_embeddings"]},
    "dora": {"use_dora": True, "target_modules": ["query", "word_embeddings"]},
    "lora_bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [1, 2]},
}


def pefts(settings, **changes):
    """(our model, PEFT's, our optimizer, PEFT's) of LoRA+."""
    ours = tiny_classifier()
    minilora.add_adapter(ours, LoraConfig(task_type="SEQ_CLS", **settings))
    theirs = peft.get_peft_model(
        tiny_classifier(), peft.LoraConfig(task_type="SEQ_CLS", **settings)
    )
    config = TrainConfig(weight_decay=0.1, learning_rate=2e-3, loraplus_lr_ratio=16.0, **changes)
    expected = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1,
        betas=(0.9, 0.999), eps=1e-8, fused=True,
    )  # fmt: skip
    return ours, theirs, build_optimizer(ours, config), expected


def groups_by_place(model, optimizer):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    places = {id(parameter): place for place, parameter in enumerate(trained)}
    settings = ("lr", "weight_decay", "betas", "eps")
    return [
        ([group[name] for name in settings], [places[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("settings", LORAPLUS.values(), ids=LORAPLUS)
def test_the_groups_of_loraplus_are_pefts(settings):
    ours, theirs, found, expected = pefts(settings)
    assert groups_by_place(ours, found) == groups_by_place(theirs, expected)
    names = [name for name, _ in minilora.trainable_parameters(ours)]
    assert sorted(place for _, places in groups_by_place(ours, found) for place in places) == list(
        range(len(names))
    )


def test_every_learning_rate_and_parameter_of_loraplus_is_pefts():
    """Six steps of a linear schedule, bit for bit."""
    ours, theirs, found, expected = pefts(LORAPLUS["embeddings"])
    config = TrainConfig(learning_rate=2e-3, warmup_steps=2, loraplus_lr_ratio=16.0)
    own = build_scheduler(found, config, 6)
    other = get_scheduler("linear", expected, num_warmup_steps=2, num_training_steps=6)
    ids, labels = torch.arange(1, 17).reshape(4, 4), torch.tensor([0, 1, 1, 0])
    for _ in range(6):
        for model, optimizer, scheduler in ((ours, found, own), (theirs, expected, other)):
            model.eval()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert own.get_last_lr() == other.get_last_lr() and len(set(own.get_last_lr())) <= 3
        trained = zip(
            (p for _, p in minilora.trainable_parameters(ours)),
            (p for p in theirs.parameters() if p.requires_grad),
            strict=True,
        )
        assert all(torch.equal(one, other_one) for one, other_one in trained)


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_heads_have_a_learning_rate_of_their_own(ratio):
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS"))
    rates = {"head_learning_rate": 5e-5, "loraplus_lr_ratio": ratio}
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1, **rates))
    *others, decayed, exempt = optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in (decayed, exempt)] == [
        (5e-5, 0.1),
        (5e-5, 0.0),
    ]
    names = [names for _, names in groups_by_name(model, optimizer)]
    assert names[-2:] == [
        ["classifier.adapters.default.weight"],
        ["classifier.adapters.default.bias"],
    ]
    rest = [name for group in names[:-2] for name in group]
    assert rest and all("lora_" in name for name in rest)
    assert {group["lr"] for group in others} <= {1e-3, 4e-3, 1e-6}


def test_a_learning_rate_of_heads_that_are_not_there_is_refused():
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig())
    with pytest.raises(MiniloraError, match="head_learning_rate: no module is trained in full"):
        build_optimizer(model, TrainConfig(head_learning_rate=1e-4))


@pytest.mark.parametrize("name", ["head_learning_rate", "loraplus_lr_ratio"])
def test_with_parity_there_is_one_learning_rate(name):
    with pytest.raises(MiniloraError, match=f"hf_parity needs {name} None, not 2.0"):
        TrainConfig(hf_parity=True, **{name: 2.0})


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
    check_optimizer(optimizer, state, tmp_path, False)
    state["param_groups"][0]["params"] = numbers
    with pytest.raises(MiniloraError, match="params"):
        check_optimizer(optimizer, state, tmp_path, False)


@pytest.mark.parametrize("position", [1.5, 1e308, 2**63, None])
def test_a_schedules_position_is_a_whole_number(position, tmp_path):
    optimizer = build_optimizer(nn.Linear(2, 2), TrainConfig())
    scheduler = build_scheduler(optimizer, TrainConfig(), 3)
    check_scheduler(scheduler, scheduler.state_dict(), tmp_path, False)
    with pytest.raises(MiniloraError, match="last_epoch is"):
        check_scheduler(
            scheduler, {**scheduler.state_dict(), "last_epoch": position}, tmp_path, False
        )
