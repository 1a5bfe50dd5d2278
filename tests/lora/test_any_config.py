"""Any `LoraConfig`, drawn: both libraries refuse it, or have the same bits, and so have files."""

import copy
import random
import re

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, set_seed

import minilora
from tests.bert.test_families import FAMILIES, SIZES

IDS = torch.arange(2, 18).reshape(2, 8)
# What we alone refuse, and what PEFT does: docs/coming_from_peft.md.
OURS, THEIRS = "keys sorted|is an embedding, which takes", "applied to modules of type <class 'peft"


def build(family, task):
    set_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return (AutoModelForSequenceClassification if task else AutoModel).from_config(config).eval()


def drawn(draw, model):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]

    def end():
        parts = draw.choice(names).split(".")
        return ".".join(parts[-draw.randint(1, len(parts)) :])

    def pattern():
        return {draw.choice([end(), ".*", "q.*|.*value"]): draw.choice([2, 4]) for _ in range(2)}

    maybe = {
        "exclude_modules": [end()], "layers_to_transform": draw.choice([1, [0, 2], [7]]),
        "rank_pattern": pattern(), "alpha_pattern": pattern(), "use_rslora": True,
        "use_dora": True, "lora_bias": True, "bias": draw.choice(["all", "lora_only"]),
        "lora_dropout": 0.5, "init_lora_weights": draw.choice(["gaussian", "pissa", "olora"]),
    }  # fmt: skip
    chosen = {name: value for name, value in maybe.items() if draw.random() < 0.25}
    targets = [[end(), end(), end()], names, "all-linear", ".*(0|2).*(dense|query|lin.)"]
    return {"r": draw.choice([2, 4]), "target_modules": draw.choice(targets), **chosen}


def adapt(function):
    set_seed(1)
    try:
        return function(), None
    except (minilora.MiniloraError, ValueError, TypeError) as error:
        return None, str(error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(120))
def test_any_config_is_pefts(seed, tmp_path):
    draw = random.Random(seed)
    family, task = draw.choice(["bert", "roberta", "distilbert"]), draw.choice(["SEQ_CLS", None])
    ours, base = build(family, task), build(family, task)
    settings = {"task_type": task, **drawn(draw, base)}
    asked = copy.deepcopy(settings)  # PEFT appends to the very list it is given
    theirs, why = adapt(lambda: peft.get_peft_model(base, peft.LoraConfig(**asked)))
    _, refused = adapt(lambda: minilora.add_adapter(ours, minilora.LoraConfig(**settings)))
    if why or refused:
        assert re.search(OURS, refused) if refused and not why else refused or THEIRS in why
        return
    draws = torch.randn(50_000)
    for parameter in (p for m in (theirs, ours) for p in m.parameters() if p.requires_grad):
        parameter.data += 0.1 * draws[: parameter.numel()].view_as(parameter)
    expected = theirs.eval()(IDS)[0]
    assert torch.equal(ours(IDS)[0], expected), settings
    theirs.save_pretrained(tmp_path / "theirs")
    minilora.save_adapter(ours, tmp_path / "ours")
    for place in ("theirs", "ours"):
        minilora.load_adapter(again := build(family, task), tmp_path / place)
        assert torch.equal(again(IDS)[0], expected), settings
