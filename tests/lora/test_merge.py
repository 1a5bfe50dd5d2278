"""Folded in, and out again: logits, bits, and what transformers reads afterwards."""

import pytest
import torch

import minilora
from minilora import LoraConfig, MiniloraError
from tests.conftest import tiny_classifier
from tests.lora.test_adapters import IDS, VARIANTS, adapted, assert_same, logits, shake, snapshot


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_merged_logits_are_the_unmerged_ones(settings):
    model = adapted(**settings)
    before = logits(model)
    assert not torch.allclose(before, logits(tiny_classifier().eval()))
    minilora.merge_adapter(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_merging_in_an_autocast_block_rounds_nothing(settings):
    model, other = adapted(**settings), adapted(**settings)
    minilora.merge_adapter(model)
    with torch.autocast("cpu", torch.bfloat16):
        minilora.merge_adapter(other)
        assert torch.is_autocast_enabled("cpu")
    assert_same(snapshot(other), snapshot(model))


def test_a_module_that_is_used_by_another_name_is_not_changed_there():
    """A whole encoder may be."""
    model = adapted(target_modules=["query"])
    model.again = model.bert
    before = logits(model)
    minilora.merge_adapter(model)
    minilora.unmerge_adapter(model)
    model.alone = model.bert.encoder.layer[1].attention.self.query.base_layer
    with pytest.raises(MiniloraError, match="would change 'alone', too"):
        minilora.merge_adapter(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_unmerging_restores_every_bit(settings, dtype):
    model = adapted(dtype, **settings)
    before = snapshot(model)
    minilora.merge_adapter(model)
    minilora.unmerge_adapter(model)
    assert_same(snapshot(model), before)


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
    with pytest.raises(MiniloraError, match="call unmerge_adapter"):
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


def test_adding_loading_and_switching_need_an_unmerged_model(tmp_path):
    model = adapted()
    minilora.merge_adapter(model)
    minilora.save_adapter(model, tmp_path)
    for action in (
        lambda: minilora.add_adapter(model, LoraConfig(), "second"),
        lambda: minilora.load_adapter(model, tmp_path),
        lambda: minilora.set_adapter(model, "default"),
        lambda: minilora.delete_adapter(model, "default"),
        lambda: minilora.disable_adapter(model).__enter__(),
    ):
        with pytest.raises(MiniloraError, match="while adapters are merged"):
            action()


def test_only_what_an_adapter_changes_is_replaced():
    for settings, changed in (({}, {"weight"}), ({"lora_bias": True}, {"weight", "bias"})):
        model = adapted(target_modules=["layer.0.attention.self.query"], **settings)
        before = dict(model.named_parameters())
        minilora.merge_adapter(model)
        after = dict(model.named_parameters())
        replaced = {name for name in before if before[name] is not after[name]}
        query = "bert.encoder.layer.0.attention.self.query"
        assert replaced == {f"{query}.base_layer.{key}" for key in changed}


def test_the_named_adapters_are_merged_and_no_other_counts():
    model = adapted()
    minilora.add_adapter(model, LoraConfig(r=2), "second")
    minilora.set_adapter(model, "second")
    shake(model, seed=2)
    alone = logits(model)
    minilora.set_adapter(model, ["default", "second"])
    both = logits(model)
    minilora.merge_adapter(model)
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-6)
    minilora.unmerge_adapter(model)
    assert torch.equal(logits(model), both)
    torch.testing.assert_close(
        logits(minilora.merge_and_unload(model, ["second"])), alone, rtol=1e-5, atol=1e-6
    )


def test_embeddings_keep_their_layout_when_merged():
    """transformers' writer takes contiguous tensors only."""
    for settings in ({}, {"use_dora": True}):
        model = adapted(target_modules=["word_embeddings"], **settings)
        minilora.merge_adapter(model)
        assert model.get_input_embeddings().weight.is_contiguous()
