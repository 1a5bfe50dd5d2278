"""Several adapters, none for a while, folded in, taken out: what each leaves behind."""

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
def test_merged_logits_are_the_unmerged_ones(settings):
    model = adapted(**settings)
    before = logits(model)
    assert not torch.allclose(before, logits(tiny_classifier().eval()))
    minilora.merge_adapter(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_unmerging_restores_every_bit(settings, dtype):
    model = adapted(dtype, **settings)
    before = snapshot(model)
    minilora.merge_adapter(model)
    minilora.unmerge_adapter(model)
    assert_same(snapshot(model), before)


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


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_unloading_gives_the_plain_model_bit_for_bit(settings):
    """Class, keys, values, requires_grad, and the original head (PEFT's unload keeps the trained
    one).
    """
    model = adapted(**settings)
    minilora.unload(model)
    assert_same(snapshot(model), snapshot(tiny_classifier()))
    assert not hasattr(model, "minilora_adapters")


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_merge_and_unload_gives_an_ordinary_model(settings, tmp_path):
    """transformers saves and loads it with no missing or unexpected key, and the same logits."""
    from transformers import BertForSequenceClassification

    model = adapted(**settings)
    before = logits(model)
    minilora.merge_and_unload(model)
    plain = tiny_classifier()
    assert type(model) is type(plain)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in plain.named_parameters()
    ]
    model.save_pretrained(tmp_path)
    again, report = BertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval()), before, rtol=1e-5, atol=1e-6)


def test_merging_twice_and_unmerging_nothing_are_errors():
    model = adapted()
    with pytest.raises(MiniloraError, match="nothing is merged"):
        minilora.unmerge_adapter(model)
    minilora.merge_adapter(model)
    with pytest.raises(MiniloraError, match="call unmerge_adapter first"):
        minilora.merge_adapter(model)


def test_a_refused_merge_changes_nothing():
    """safe_merge finds NaN in the last layer before the first one is changed."""
    model = adapted()
    _, last = minilora.trainable_parameters(model)[7]  # B of the second layer's value
    last.data[0, 0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(MiniloraError, match=r"layer\.1\.attention\.self\.\w+ gives NaN"):
        minilora.merge_adapter(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


def test_saving_while_merged_saves_the_adapter(tmp_path):
    model = adapted()
    minilora.save_adapter(model, tmp_path / "unmerged")
    minilora.merge_adapter(model)
    minilora.save_adapter(model, tmp_path / "merged")
    name = "adapter_model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "unmerged" / name).read_bytes()


def test_training_while_merged_reaches_the_head_and_not_the_adapter():
    """The update is part of frozen weights then: A and B get no gradient, as the docs say."""
    model = adapted()
    minilora.merge_adapter(model)
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in minilora.trainable_parameters(model):
        assert (parameter.grad is None) is (".lora_" in name), name


def test_switching_needs_an_unmerged_model():
    model = adapted()
    minilora.merge_adapter(model)
    for action in (
        lambda: minilora.set_adapter(model, "default"),
        lambda: minilora.delete_adapter(model, "default"),
        lambda: minilora.disable_adapter(model).__enter__(),
    ):
        with pytest.raises(MiniloraError, match="while adapters are merged"):
            action()


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
