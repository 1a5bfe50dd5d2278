"""What users of PEFT and transformers expect, beyond the numbers."""

import copy
import json
import pickle

import peft
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import yaml
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import minilora
from minilora import LoraConfig, MiniloraError
from minilora.lora.peft_files import JUNK
from tests.conftest import tiny_classifier, tiny_config
from tests.lora.test_adapters import adapted, assert_same, logits, snapshot

TASK = {"task_type": "SEQ_CLS"}


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def distributed(model):
    # Only what trains is distributed: it asks for a parameter that needs a gradient.
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


@pytest.mark.parametrize("wrap", [compiled, distributed, lambda m: distributed(compiled(m))])
def test_a_compiled_or_distributed_model_is_looked_through(wrap, process_group, tmp_path):
    """Every function does to it what it does to the model within; files have the usual keys."""
    bare = adapted()
    model = wrap(copy.deepcopy(bare))
    minilora.save_adapter(bare, tmp_path / "bare")
    minilora.save_adapter(model, tmp_path / "wrapped")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (tmp_path / place / name for place in ("bare", "wrapped"))
        assert one.read_bytes() == other.read_bytes()
    names = [name for name, _ in minilora.trainable_parameters(bare)]
    assert [name for name, _ in minilora.trainable_parameters(model)] == names

    def every_call(model):
        minilora.load_adapter(model, tmp_path / "bare")
        minilora.add_adapter(model, LoraConfig(init_lora_weights=False, **TASK), "second")
        minilora.set_adapter(model, "second")
        minilora.merge_adapter(model)
        minilora.unmerge_adapter(model)
        minilora.delete_adapter(model, "default")
        with minilora.disable_adapter(model):
            outputs = [logits(model)]
        with minilora.adapter_names(model, ["second", "__base__"]):
            outputs.append(logits(model))
        return minilora.merge_and_unload(model), outputs

    plain = []
    for one in (bare, model):
        torch.manual_seed(0)
        plain.append(every_call(one))
    assert type(plain[1][0]) is type(bare)
    assert_same(snapshot(plain[1][0]), snapshot(plain[0][0]))
    for one, other in zip(plain[0][1], plain[1][1], strict=True):
        torch.testing.assert_close(one, other)
    minilora.load_adapter(model, tmp_path / "bare")
    minilora.unload(model)
    minilora.combine_adapters(model, [tmp_path / "bare"], [1.0])


def test_save_pretrained_of_an_adapted_model_names_the_right_call(tmp_path):
    """What it would write loads with random weights. Copies and pickles are no way around it."""
    model = adapted()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(MiniloraError, match="call save_adapter, or merge_and_unload first"):
            one.save_pretrained(tmp_path / "no")
        assert not (tmp_path / "no").exists()
        minilora.unload(one).save_pretrained(tmp_path / "yes")
        assert (tmp_path / "yes" / "config.json").exists()


def test_a_failed_first_adapter_leaves_save_pretrained_alone(tmp_path):
    model = tiny_classifier()
    with pytest.raises(MiniloraError):
        minilora.add_adapter(model, LoraConfig(init_lora_weights="orthogonal", r=3))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_modules_trained_whole_show_their_attributes():
    """transformers looks for the word embeddings within; what is found is the trained copy."""
    model = adapted(modules_to_save=["embeddings"])
    words = model.get_input_embeddings()
    assert isinstance(words, nn.Embedding) and words.weight.requires_grad
    embeddings = model.bert.embeddings
    assert words is embeddings.word_embeddings is not embeddings.base_layer.word_embeddings
    assert model.classifier.out_features == 2 and model.classifier.weight.requires_grad
    with minilora.disable_adapter(model):
        assert model.get_input_embeddings() is embeddings.base_layer.word_embeddings


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("name", ["default", "second"])
def test_loading_for_inference_ends_training_mode_as_in_peft(is_trainable, name, tmp_path):
    minilora.save_adapter(adapted(), tmp_path)
    theirs = peft.get_peft_model(tiny_classifier(), peft.LoraConfig(**TASK)).train()
    theirs.load_adapter(tmp_path, name, is_trainable=is_trainable)
    ours = adapted().train()
    minilora.load_adapter(ours, tmp_path, name, is_trainable=is_trainable)
    assert ours.training == theirs.training == is_trainable


RESIZED = {
    "classifier": (BertForSequenceClassification, {}),
    "adapted": (BertForSequenceClassification, {"target_modules": ["query", "word_embeddings"]}),
    "trained": (BertForSequenceClassification, {"modules_to_save": ["word_embeddings"]}),
    "some rows": (BertForSequenceClassification, {"trainable_token_indices": [1, 51]}),
    "masked": (BertForMaskedLM, {}),
    "masked and adapted": (BertForMaskedLM, {"target_modules": ["query", "word_embeddings"]}),
}


def resized_model(auto_class, path, rows):
    """The base at `path` with another number of rows, drawn anew in each call."""
    model = auto_class.from_pretrained(path).eval()
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("case", RESIZED)
@pytest.mark.parametrize("rows", [53, 47])
def test_resized_embeddings_are_written_and_read_as_peft_does(case, rows, tmp_path):
    """The same keys and values in both files, and the same logits from either, in either."""
    auto_class, extra = RESIZED[case]
    extra = {"target_modules": ["query"], **extra}
    if case == "some rows":
        extra["trainable_token_indices"] = [1, rows - 1]
    auto_class(tiny_config(vocab_size=50)).save_pretrained(tmp_path / "base")
    model = resized_model(auto_class, tmp_path / "base", rows)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**extra)).eval()
    minilora.add_adapter(model, LoraConfig(**extra))
    theirs.save_pretrained(tmp_path / "theirs")
    minilora.load_adapter(model, tmp_path / "theirs")
    minilora.save_adapter(model, tmp_path / "ours")
    found, expected = (
        safetensors.torch.load((tmp_path / own / "adapter_model.safetensors").read_bytes())
        for own in ("ours", "theirs")
    )
    assert found.keys() == {key for key in expected if not JUNK.search(key)}
    assert any(len(tensor) == rows for tensor in found.values())
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    ids = torch.tensor([[1, 2, rows - 1]])
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        fresh = resized_model(auto_class, tmp_path / "base", rows)
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        minilora.load_adapter(fresh, path)
        torch.testing.assert_close(fresh(ids).logits, theirs(ids).logits)
        after = minilora.unload(fresh).state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    again = resized_model(auto_class, tmp_path / "base", rows)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits)


def test_resized_embeddings_need_a_model_of_their_size_and_to_be_alone(tmp_path):
    BertForSequenceClassification(tiny_config(vocab_size=50)).save_pretrained(tmp_path / "base")
    model = resized_model(BertForSequenceClassification, tmp_path / "base", 53)
    minilora.add_adapter(model, LoraConfig(target_modules=["query"]))
    minilora.save_adapter(model, tmp_path)
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with pytest.raises(MiniloraError, match=r"has 53 rows, not 50: call resize_token_embeddings"):
        minilora.load_adapter(plain, tmp_path)
    other = resized_model(BertForSequenceClassification, tmp_path / "base", 53)
    minilora.add_adapter(other, LoraConfig(target_modules=["query"]), "first")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(MiniloraError, match=r"brings another .* must be alone on its model"):
        minilora.load_adapter(other, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    minilora.unload(other)
    minilora.load_adapter(other, tmp_path)
    with pytest.raises(MiniloraError, match="it must be alone on its model"):
        minilora.add_adapter(other, LoraConfig(target_modules=["query"]), "second")


CONVERTED = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4", "rank_pattern": {"layer.0.attention.self.query": 2}},
    {"init_lora_weights": "olora", "use_rslora": True},
    {"init_lora_weights": "olora", "alpha_pattern": {"layer.0.attention.self.query": 2}},
]


@pytest.mark.parametrize("setting", CONVERTED)
def test_pissa_and_olora_are_converted_to_a_plain_adapter_as_peft_does(setting, tmp_path):
    """Which gives the trained logits over the plain base, beside any other adapter."""
    setting = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **setting}
    theirs = peft.get_peft_model(tiny_classifier(), peft.LoraConfig(**setting)).eval()
    theirs.peft_config["default"].init_lora_weights = True  # what PEFT asks for
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = setting["init_lora_weights"]
    model = tiny_classifier().eval()
    minilora.add_adapter(model, LoraConfig(**setting))
    minilora.save_adapter(model, tmp_path / "began")
    with torch.no_grad():
        for (_, a), (_, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
            b.copy_(a)
            if a.requires_grad:
                b += 0.1 * torch.randn_like(b)
                a.copy_(b)
    trained = logits(model)
    began = {"path_initial_model_for_weight_conversion": tmp_path / "began"}
    minilora.save_adapter(model, tmp_path / "ours", **began)
    began = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
    if setting["init_lora_weights"] != "pissa_niter_4":  # whose initial values are drawn
        theirs.save_pretrained(tmp_path / "theirs", **began)
        found, expected = (
            safetensors.torch.load((tmp_path / own / "adapter_model.safetensors").read_bytes())
            for own in ("ours", "theirs")
        )
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key])
    for path in {tmp_path / "ours", tmp_path / "theirs"}:
        if path.exists():
            fresh = tiny_classifier().eval()
            minilora.load_adapter(fresh, path)
            torch.testing.assert_close(logits(fresh), trained, rtol=1e-4, atol=1e-5)
    minilora.add_adapter(fresh, LoraConfig(), "beside")


def test_a_conversion_from_other_values_than_the_first_is_refused(tmp_path):
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(init_lora_weights="pissa", r=4))
    minilora.save_adapter(model, tmp_path / "began")
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.adapters["default"].lora_B.weight += 0.1
    minilora.save_adapter(model, tmp_path / "later")
    minilora.save_adapter(model, tmp_path / "a", "default", tmp_path / "began")
    with pytest.raises(MiniloraError, match=r"holds another bert\.encoder\.layer\.1\.attention"):
        minilora.save_adapter(model, tmp_path / "b", "default", tmp_path / "later")
    assert not (tmp_path / "b").exists()
    with pytest.raises(MiniloraError, match="is for adapters that reduced their base"):
        minilora.save_adapter(adapted(), tmp_path / "c", "default", tmp_path / "began")


@pytest.mark.parametrize("init", ["eva", "OLoRA"])
def test_adapters_that_were_drawn_in_ways_of_pefts_can_be_read(init, tmp_path):
    """And give PEFT's logits; drawing them is refused."""
    with pytest.raises(MiniloraError, match="init_lora_weights is"):
        LoraConfig(init_lora_weights=init)
    extra = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    config = peft.LoraConfig(init_lora_weights=init, **extra, **TASK)
    theirs = peft.get_peft_model(tiny_classifier(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name and init == "eva":
                parameter += 0.1
    theirs.save_pretrained(tmp_path)
    model = tiny_classifier().eval()
    minilora.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_bytes())["init_lora_weights"] == init


@pytest.mark.parametrize("base", ["someone/some-bert", "x\nlicense: mit\n---\n\x1b[2J", "a: [b"])
def test_the_card_carries_the_hubs_tag_of_the_base_and_nothing_else_of_it(base, tmp_path):
    minilora.save_adapter(adapted(base_model_name_or_path=base), tmp_path)
    card = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == base and metadata.keys() == {
        "base_model",
        "library_name",
        "tags",
    }
    assert metadata["tags"] == [f"base_model:adapter:{base}", "lora", "minilora"]
    assert "\x1b" not in card and len(card.split("---\n")[2].strip().splitlines()) == 1


VARIOUS = [
    {},
    {"use_dora": True},
    {"target_modules": ["query", "word_embeddings"]},
    {"trainable_token_indices": [1, 3]},
]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("settings", VARIOUS, ids=str)
def test_an_adapters_dtype_over_a_bfloat16_base_is_pefts(settings, autocast, tmp_path):
    """Values, logits, and after loading."""
    base = tiny_classifier().to(torch.bfloat16).eval()
    config = peft.LoraConfig(init_lora_weights=False, **settings)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast)
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, **settings)
    minilora.add_adapter(base, config, autocast_adapter_dtype=autocast)
    of_theirs = [p for p in theirs.parameters() if p.requires_grad]
    of_ours = [p for _, p in minilora.trainable_parameters(base)]
    for one, other in zip(of_ours, of_theirs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert torch.equal(logits(base), logits(theirs.eval()))
    minilora.save_adapter(base, tmp_path)
    again = tiny_classifier().to(torch.bfloat16)
    minilora.load_adapter(again, tmp_path, autocast_adapter_dtype=autocast)
    saved = minilora.adapter_state_dict(base)
    for key, tensor in minilora.adapter_state_dict(again).items():
        assert tensor.dtype == saved[key].dtype and torch.equal(tensor, saved[key])


@pytest.mark.parametrize("targets", ["all-linear", "the dense ones, by name"])
@pytest.mark.parametrize("layers", [3, 5])
def test_twenty_targets_or_more_are_shortened_as_in_peft(targets, layers):
    model = tiny_classifier(num_hidden_layers=layers)
    if targets != "all-linear":
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        targets = [name for name in linear if "pooler" not in name and "classifier" not in name]
    theirs = peft.get_peft_model(
        tiny_classifier(num_hidden_layers=layers), peft.LoraConfig(target_modules=targets, **TASK)
    )
    names = minilora.add_adapter(model, LoraConfig(target_modules=targets, **TASK))
    config = model.minilora_adapters.configs["default"]
    assert set(config.target_modules) == set(theirs.peft_config["default"].target_modules)
    assert len(config.target_modules) < (20 if layers == 5 else 99)
    matched = {name.removeprefix("base_model.model.") for name in theirs.targeted_module_names}
    assert set(names) == matched


@pytest.mark.parametrize("saved", [None, ["layer.1.attention.self.key"]])
@pytest.mark.parametrize("layers", [2, 5])
def test_all_linear_is_written_as_peft_writes_it_where_a_head_has_layers(layers, saved):
    """RoBERTa's head is two layers, which no adapter has."""
    settings = {"target_modules": "all-linear", "modules_to_save": saved, **TASK}
    config = RobertaConfig(**tiny_config(num_hidden_layers=layers).to_diff_dict())
    ours = RobertaForSequenceClassification(config)
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(**copy.deepcopy(settings)))
    names = minilora.add_adapter(ours, LoraConfig(**settings))
    found = ours.minilora_adapters.configs["default"].target_modules
    assert set(found) == set(theirs.peft_config["default"].target_modules)
    assert not any("classifier" in name for name in names)
