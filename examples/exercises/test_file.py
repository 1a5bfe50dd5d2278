"""Exercise 2 against PEFT, which reads what you write and writes what you read; minilora, too."""

import json
from pathlib import Path

import pytest
import torch
from answers.ex2_file import read_adapter, read_config, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import minilora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's calls of transformers

CONFIG = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier"],
    "task_type": "SEQ_CLS",
}
WEIGHTS = "adapter_model.safetensors"
A_KEY = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_A.weight"
IDS = torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]])


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return BertForSequenceClassification(config).eval()


def model_with_lora(seed: int) -> nn.Module:
    """Parameters called as exercise 1's layers call them; for the file no forward is needed."""
    model = bert(0).requires_grad_(False)
    torch.manual_seed(seed)
    for block in model.bert.encoder.layer:
        for name in CONFIG["target_modules"]:
            wrapper = nn.Module()
            wrapper.base_layer = getattr(block.attention.self, name)
            wrapper.lora_A = nn.Linear(8, CONFIG["r"], bias=False)
            wrapper.lora_B = nn.Linear(CONFIG["r"], 8, bias=False)
            setattr(block.attention.self, name, wrapper)
    model.classifier = nn.Linear(8, 2)
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {f"base_model.model.{n}": p.detach().clone() for n, p in named if p.requires_grad}


def written(directory: Path) -> dict[str, torch.Tensor]:
    """What is trained in a model of which you have written the adapter to `directory`."""
    model = model_with_lora(seed=1)
    write_adapter(model, directory, dict(CONFIG))
    return trained(model)


def test_the_file_holds_what_was_trained_and_nothing_else(tmp_path):
    expected = written(tmp_path / "new")
    stored = load_file(tmp_path / "new" / WEIGHTS)
    extra, missing = sorted(stored.keys() - expected), sorted(expected.keys() - stored)
    assert not extra, f"keys that PEFT does not know, or the frozen base's: {extra[:3]}"
    assert not missing, f"missing: {missing[:3]}. The head is trained too, hence saved"
    assert all(torch.equal(stored[key], expected[key]) for key in expected), "other values"


def test_PEFT_reads_what_you_write(tmp_path):
    expected = written(tmp_path)
    theirs = PeftModel.from_pretrained(bert(), str(tmp_path))
    loaded = get_peft_model_state_dict(theirs)
    assert loaded.keys() == expected.keys(), "PEFT made other tensors of your config"
    wrong = [key for key in expected if not torch.equal(loaded[key], expected[key])]
    assert not wrong, f"PEFT did not find the values of {wrong[:3]}: the keys are not its own"
    scaling = theirs.base_model.model.bert.encoder.layer[0].attention.self.query.scaling
    assert scaling == {"default": 3.0}, f"scaling is {scaling}: lora_alpha or r is not in the file"


def test_minilora_reads_the_same_function(tmp_path):
    written(tmp_path)
    ours = bert()
    minilora.load_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(bert(), str(tmp_path))
    assert torch.equal(ours(IDS).logits, theirs(input_ids=IDS).logits)


def test_you_read_what_PEFT_writes(tmp_path):
    torch.manual_seed(2)
    theirs = get_peft_model(bert(), LoraConfig(init_lora_weights=False, **CONFIG))
    theirs.save_pretrained(tmp_path)
    model = model_with_lora(seed=3)
    read_adapter(model, tmp_path)
    found, expected = trained(model), get_peft_model_state_dict(theirs)
    wrong = [key for key in found if not torch.equal(found[key], expected[key])]
    assert not wrong, f"after reading PEFT's file these have other values: {wrong[:3]}"
    config = read_config(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 12)


def test_what_the_config_does_not_say_is_PEFTs_default(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    config, expected = read_config(tmp_path), LoraConfig(r=4)
    for name in ("r", "lora_alpha", "lora_dropout"):
        assert config.get(name) == getattr(expected, name), (
            f"{name} is {config.get(name)}; PEFT takes {getattr(expected, name)}. A lacking field "
            "does not mean r, or zero: it means the default of LoraConfig"
        )


@pytest.mark.parametrize("field", ["use_dora", "use_rslora", "rank_pattern", "peft_type"])
def test_what_would_change_the_numbers_is_refused_by_name(field, tmp_path):
    value = {"rank_pattern": {"query": 2}, "peft_type": "IA3"}.get(field, True)
    text = json.dumps({"peft_type": "LORA", **CONFIG, field: value})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=field):
        read_config(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "reshaped"])
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(damage, tmp_path):
    written(tmp_path)
    stored, key = load_file(tmp_path / WEIGHTS), A_KEY
    if damage == "missing":
        del stored[key]
    elif damage == "unexpected":
        key = A_KEY.replace("value", "key")
        stored[key] = torch.zeros(4, 8)
    else:  # which copy_ would take: it is broadcast
        stored[key] = stored[key][:1].clone()
    save_file(stored, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = model_with_lora(seed=3)
    before = trained(model)
    try:
        read_adapter(model, tmp_path)
    except (ValueError, KeyError, RuntimeError) as error:
        assert isinstance(error, ValueError), f"a ValueError, please, not {error!r}"
        assert key in str(error), f"the message should name {key}, and says: {error}"
    else:
        pytest.fail(f"{key} is {damage} in the file, and nobody was told: half a model is loaded")
    after = trained(model)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert not changed, f"refused, but {changed[:2]} had been changed already: check, then copy"
