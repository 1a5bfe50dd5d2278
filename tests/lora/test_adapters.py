"""Adapters put in, switched, disabled, taken out: what each leaves behind."""

import contextlib

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


@pytest.mark.parametrize("name", ["", "a.b", "keys", 3, None])
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


@pytest.mark.parametrize("targets", [["dense"], r".*pooler\.dense"], ids=str)
def test_a_later_adapter_does_not_look_into_a_trained_module(targets):
    """Its copies belong to the adapter that trains them; skipped in silence, the file would be
    refused by any other model.
    """
    model = adapted(modules_to_save=["pooler"])
    with pytest.raises(
        MiniloraError, match=r"'bert\.pooler\.dense' in 'bert\.pooler', which anoth"
    ):
        minilora.add_adapter(model, LoraConfig(target_modules=targets), "second")
    config = LoraConfig(target_modules=["dense"], exclude_modules=["pooler.dense"])
    names = minilora.add_adapter(model, config, "second")
    assert names and not [name for name in names if "pooler" in name]


def test_a_second_all_linear_adapter_leaves_the_firsts_head_alone():
    model = adapted(target_modules="all-linear", modules_to_save=["pooler"])
    names = minilora.add_adapter(model, LoraConfig(target_modules="all-linear"), "second")
    assert names and not [name for name in names if "pooler" in name or "classifier" in name]


@pytest.mark.parametrize("name", ["/tmp/elsewhere", "../up", "__base__", "a b", "a\n"])
def test_a_name_that_is_no_name_of_a_directory_is_refused(name):
    model = tiny_classifier()
    with pytest.raises(MiniloraError, match="cannot be a module's name"):
        minilora.add_adapter(model, LoraConfig(), name)
    assert_same(snapshot(model), snapshot(tiny_classifier()))


def test_a_module_within_another_that_is_trained_whole_is_trained_once(tmp_path):
    model = adapted(modules_to_save=["pooler", "pooler.dense"])
    minilora.save_adapter(model, tmp_path)
    again = tiny_classifier().eval()
    minilora.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"bias": "all"}], ids=str)
@pytest.mark.parametrize("leave", ["disable", "unload", "unmerge"])
def test_what_was_kept_aside_has_the_models_dtype_when_it_comes_back(leave, settings):
    model, plain = adapted(**settings), tiny_classifier().eval().to(torch.bfloat16)
    if leave == "unmerge":
        minilora.merge_adapter(model)
    model.to(torch.bfloat16)
    if leave == "unmerge":
        minilora.unmerge_adapter(model)
        minilora.unload(model)
    elif leave == "unload":
        minilora.unload(model)
    with minilora.disable_adapter(model) if leave == "disable" else contextlib.nullcontext():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(logits(model), logits(plain))


def test_several_dora_updates_add_up_in_any_order_and_merged():
    """Each is defined by the base weight alone. (PEFT's depend on the order of their names.)"""
    model = adapted(use_dora=True, target_modules=["query", "word_embeddings"])
    config = LoraConfig(use_dora=True, target_modules=["query", "word_embeddings"])
    minilora.add_adapter(model, config, "second")
    minilora.set_adapter(model, "second")
    shake(model, seed=2)
    outputs = []
    for names in (["default", "second"], ["second", "default"]):
        minilora.set_adapter(model, names)
        outputs.append(logits(model))
        minilora.merge_adapter(model)
        outputs.append(logits(model))
        minilora.unmerge_adapter(model)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: minilora.delete_adapter(model, "default"),
        lambda model: minilora.add_adapter(model, LoraConfig(), "second"),
        minilora.merge_adapter,
        minilora.unload,
    ],
)
def test_what_changes_adapters_is_refused_while_they_are_disabled(call):
    model = adapted()
    before, output = snapshot(model), logits(model)
    with minilora.disable_adapter(model), minilora.disable_adapter(model):
        with pytest.raises(MiniloraError, match="while adapters are disabled: leave disable_adapt"):
            call(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_rank_that_a_matrix_has_not_is_refused_where_it_is_split(init):
    """B and A would be smaller than r, and could not be read again."""
    model = tiny_classifier()
    before = snapshot(model)
    with pytest.raises(MiniloraError, match="a matrix of rank 32: r is 33"):
        minilora.add_adapter(model, LoraConfig(r=33, init_lora_weights=init))
    assert_same(snapshot(model), before)
