"""Adapters put in, switched, disabled, taken out: what each leaves behind."""

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, MiniloraError
from tests.conftest import tiny_classifier

IDS = torch.arange(1, 17).reshape(2, 8)
VARIANTS = [
    {},
    {"use_rslora": True, "lora_dropout": 0.1},
    {"use_dora": True},
    {"bias": "all"},
    {"lora_bias": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"target_modules": ["query", "word_embeddings"]},
    {"target_modules": ["query", "word_embeddings"], "use_dora": True},
    {"modules_to_save": ["pooler"]},
    {"trainable_token_indices": [1, 3]},
]


def adapted(dtype=torch.float32, name="default", **settings):
    """A tiny classifier with a trained-looking adapter, in eval mode."""
    model = tiny_classifier().to(dtype)
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", **settings), name)
    shake(model)
    return model.eval()


def shake(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for _, parameter in minilora.trainable_parameters(model):
        parameter.data += (torch.randn(parameter.shape, generator=draw) * 0.1).to(parameter.dtype)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def snapshot(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name][0], other[name][0]) and one[name][1] == other[name][1], name


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_disabled_the_model_is_the_plain_one_and_afterwards_as_found(settings):
    model = adapted(**settings)
    before, output = snapshot(model), logits(model)
    with minilora.disable_adapter(model):
        assert torch.equal(logits(model), logits(tiny_classifier().eval()))
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), output)


def test_disabling_leaves_a_frozen_adapter_frozen(tmp_path):
    """PEFT's makes it trainable on the way out (peft#3447)."""
    minilora.save_adapter(adapted(), tmp_path)
    model = tiny_classifier()
    minilora.load_adapter(model, tmp_path)
    with minilora.disable_adapter(model):
        pass
    assert minilora.trainable_parameters(model) == []


def test_disabling_ends_also_when_the_body_raises():
    model = adapted(init_lora_weights="pissa")
    before, output = snapshot(model), logits(model)
    with pytest.raises(KeyError), minilora.disable_adapter(model):
        raise KeyError
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), output)


def test_two_adapters_switch_and_each_is_what_it_is_alone():
    model = adapted()
    first = logits(model)
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=4), "second")
    assert torch.equal(logits(model), first), "a further adapter waits"
    minilora.set_adapter(model, "second")
    shake(model, seed=2)
    second = logits(model.eval())
    assert all(".default." not in name for name, _ in minilora.trainable_parameters(model))
    minilora.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    minilora.delete_adapter(model, "default")
    assert torch.equal(logits(model), second)
    minilora.delete_adapter(model, "second")
    assert_same(snapshot(model), snapshot(tiny_classifier()))


def test_several_adapters_at_once_add_up():
    """The update of both is the sum of the updates of each, in one linear layer."""
    model = nn.Sequential(nn.Linear(6, 5))
    for name in ("a", "b"):
        minilora.add_adapter(model, LoraConfig(target_modules=["0"], init_lora_weights=False), name)
    x = torch.randn(3, 6)
    outputs = {}
    for names in (["a"], ["b"], ["a", "b"]):
        minilora.set_adapter(model, names)
        outputs[tuple(names)] = model(x)
    base = model[0].base_layer(x)
    expected = outputs[("a",)] + outputs[("b",)] - base
    torch.testing.assert_close(outputs[("a", "b")], expected)


def test_two_heads_cannot_be_active_at_once():
    model = adapted()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS"), "second")
    with pytest.raises(MiniloraError, match="only one can be active"):
        minilora.set_adapter(model, ["default", "second"])


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_an_unusable_name_is_refused(name):
    with pytest.raises(MiniloraError, match="cannot be a module's name"):
        minilora.add_adapter(tiny_classifier(), LoraConfig(), name)


def test_a_failed_injection_leaves_the_model_as_it_was():
    model = tiny_classifier()
    with pytest.raises(MiniloraError, match="even r"):
        minilora.add_adapter(model, LoraConfig(init_lora_weights="orthogonal", r=3))
    assert_same(snapshot(model), snapshot(tiny_classifier()))


def test_unknown_adapters_are_named():
    model = adapted()
    with pytest.raises(
        MiniloraError, match=r"no adapter named \['other'\]; this model has default"
    ):
        minilora.set_adapter(model, "other")
    with pytest.raises(MiniloraError, match="has no adapter"):
        minilora.set_adapter(tiny_classifier(), "default")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"modules_to_save": ["pooler.dense"]}, {"target_modules": ["pooler.dense"]}),
        ({"target_modules": ["pooler.dense"]}, {"modules_to_save": ["pooler.dense"]}),
        ({"target_modules": ["word_embeddings"]}, {"trainable_token_indices": [1]}),
        ({"trainable_token_indices": [1]}, {"target_modules": ["word_embeddings"]}),
    ],
    ids=str,
)
def test_a_module_that_is_adapted_in_another_way_is_refused(first, second):
    """And the model stays as it was: in one config, or beside an adapter that is there."""
    model = adapted(**first)
    before, output = snapshot(model), logits(model)
    with pytest.raises(MiniloraError, match=r"'bert\.[\w.]+'"):
        minilora.add_adapter(model, LoraConfig(**second), "second")
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), output)


CHANGING = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"},
    {"bias": "lora_only"},
    {"bias": "all"},
]


@pytest.mark.parametrize("changing", CHANGING, ids=str)
@pytest.mark.parametrize("comes_first", [True, False])
def test_an_adapter_that_changes_the_base_is_alone_on_its_model(changing, comes_first):
    model = adapted(**(changing if comes_first else {}))
    before, output = snapshot(model), logits(model)
    with pytest.raises(MiniloraError, match="must be alone on its model"):
        minilora.add_adapter(model, LoraConfig(**({} if comes_first else changing)), "second")
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), output)


def test_embeddings_cannot_be_adapted_twice_by_one_config():
    config = LoraConfig(target_modules=["word_embeddings"], trainable_token_indices=[1])
    model = tiny_classifier()
    with pytest.raises(MiniloraError, match="word_embeddings' is a LoRAEmbedding already"):
        minilora.add_adapter(model, config)
    assert_same(snapshot(model), snapshot(tiny_classifier()))


def test_a_later_adapter_does_not_look_into_a_trained_head():
    """Its copies belong to the adapter that trains them."""
    model = adapted(modules_to_save=["pooler"])
    names = minilora.add_adapter(model, LoraConfig(target_modules=["dense"]), "second")
    assert names and not [name for name in names if "pooler" in name]
