"""One batch, rows with different adapters: each row is that of its adapter alone."""

import peft
import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification, set_seed

from minilora import (
    LoraConfig,
    MiniloraError,
    adapter_names,
    add_adapter,
    disable_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from tests.conftest import tiny_classifier

BATCH = {
    "input_ids": torch.tensor([[2, 7, 8, 9], [2, 10, 3, 0], [2, 11, 12, 3], [2, 6, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]),
}
NAMES = ["a", "__base__", "b", "a"]

PLAIN = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
EMBEDDINGS = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
SETTINGS = {
    "query and value, with heads": (PLAIN, PLAIN),
    "another rank and other targets": (PLAIN, {**PLAIN, "target_modules": "all-linear", "r": 2}),
    "DoRA": (PLAIN, {**PLAIN, "use_dora": True}),
    "rslora, lora_bias": ({**PLAIN, "use_rslora": True}, {**PLAIN, "lora_bias": True}),
    "all three embeddings": (PLAIN, {**PLAIN, "target_modules": EMBEDDINGS}),
    "trainable tokens": (PLAIN, {**PLAIN, "trainable_token_indices": [7, 11]}),
    "the pooler, too": (PLAIN, {**PLAIN, "modules_to_save": ["pooler"]}),
    "no head": (PLAIN, {"target_modules": ["value", "intermediate.dense"], "r": 16}),
}  # fmt: skip


def draw_values(model) -> None:
    """Every adapter tensor away from its start, where B is zero."""
    set_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def model_with(*settings):
    model = tiny_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for name, setting in zip("ab", settings, strict=False):
        add_adapter(model, LoraConfig(**setting), name)
    draw_values(model)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def alone(model, name):
    """The whole batch through one adapter, or through none."""
    if name == "__base__":
        with disable_adapter(model):
            return logits(model)
    set_adapter(model, name)
    return logits(model)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_row_is_that_of_its_adapter_alone(settings):
    model = model_with(*settings)
    expected = {name: alone(model, name) for name in set(NAMES)}
    with adapter_names(model, NAMES):
        mixed = logits(model)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-6)
        for other in set(NAMES) - {name}:
            assert not torch.allclose(mixed[row], expected[other][row], atol=1e-4)


def test_what_is_active_does_not_matter():
    model = model_with(PLAIN, PLAIN)
    found = []
    for active in ("a", "b"):
        set_adapter(model, active)
        with adapter_names(model, NAMES):
            found.append(logits(model))
    assert torch.equal(*found)


def test_peft_answers_the_same(tmp_path):
    """Its adapter_names argument, with the same adapters from the same files."""
    ours = model_with(PLAIN, {**PLAIN, "r": 4, "lora_alpha": 3})
    for name in "ab":
        save_adapter(ours, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(
        tiny_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        tmp_path / "a",
        adapter_name="a",
    )
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    with torch.no_grad():
        expected = theirs.eval()(**BATCH, adapter_names=NAMES).logits
    with adapter_names(ours, NAMES):
        torch.testing.assert_close(logits(ours), expected)


def test_a_head_that_is_no_linear_layer_is_mixed_too():
    """RoBERTa's, which PEFT refuses."""
    set_seed(0)
    config = RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).eval()
    for name in "ab":
        add_adapter(model, LoraConfig(**PLAIN), name)
    draw_values(model)
    expected = {name: alone(model, name) for name in set(NAMES)}
    with adapter_names(model, NAMES):
        mixed = logits(model)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-5, atol=1e-6)


def test_a_bfloat16_model_is_mixed_in_its_own_dtype():
    model = tiny_classifier().to(torch.bfloat16)
    for name in "ab":
        add_adapter(model, LoraConfig(**PLAIN), name)
    draw_values(model.eval())
    expected = {name: alone(model, name) for name in set(NAMES)}
    with adapter_names(model, NAMES):
        mixed = logits(model)
    assert mixed.dtype == torch.bfloat16
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=2e-2, atol=2e-2)


def test_gradients_reach_the_rows_adapters_and_no_other():
    model = model_with(PLAIN, PLAIN)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with adapter_names(model, ["b", "b", "__base__", "b"]):
        model(**BATCH).logits.sum().backward()
    touched = {
        name.partition(".adapters.")[2].partition(".")[0]
        for name, p in model.named_parameters()
        if ".adapters." in name and p.grad is not None and p.grad.any()
    }
    assert touched == {"b"}


def test_the_model_is_as_it_was_also_when_the_forward_raises():
    model = model_with(PLAIN, PLAIN)
    before, trainable = logits(model), [name for name, _ in trainable_parameters(model)]
    with pytest.raises(IndexError), adapter_names(model, ["a"]):
        model(input_ids=torch.tensor([[10_000]]))
    assert torch.equal(logits(model), before)
    assert [name for name, _ in trainable_parameters(model)] == trainable
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_an_inner_block_holds_until_its_end():
    model = model_with(PLAIN, PLAIN)
    with adapter_names(model, NAMES):
        outer = logits(model)
        with adapter_names(model, ["b"] * 4):
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)


def test_disabled_means_disabled():
    model = model_with(PLAIN, PLAIN)
    plain = alone(model, "__base__")
    with adapter_names(model, NAMES), disable_adapter(model):
        assert torch.equal(logits(model), plain)
    with disable_adapter(model), adapter_names(model, NAMES):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_batch_of_another_length_is_refused(count):
    model = model_with(PLAIN, PLAIN)
    with adapter_names(model, ["a"] * count):
        with pytest.raises(MiniloraError, match=f"has {count} names .* a batch of 4 rows"):
            logits(model)
    one = {name: tensor[:1] for name, tensor in BATCH.items()}
    with adapter_names(model, NAMES), pytest.raises(MiniloraError, match="a batch of 1 rows"):
        model(**one)


def test_an_unknown_name_is_refused_with_the_known_ones():
    model = model_with(PLAIN, PLAIN)
    for names in (["a", "c"], []):
        with pytest.raises(
            MiniloraError, match="no adapter named .* this model has a, b, __base__"
        ):
            with adapter_names(model, names):
                pass


def test_merged_adapters_are_refused_before_and_inside():
    model = model_with(PLAIN, PLAIN)
    merge_adapter(model)
    with pytest.raises(MiniloraError, match="while adapters are merged"):
        with adapter_names(model, NAMES):
            pass
    unmerge_adapter(model)
    with adapter_names(model, NAMES):
        merge_adapter(model)
        with pytest.raises(MiniloraError, match="while adapters are merged"):
            logits(model)


@pytest.mark.parametrize("setting", [{"bias": "lora_only"}, {"init_lora_weights": "pissa"}])
def test_adapters_that_change_the_base_weights_are_refused(setting):
    model = model_with({**PLAIN, **setting})
    with pytest.raises(MiniloraError, match="rows of one batch cannot have different ones"):
        with adapter_names(model, ["a", "__base__"]):
            pass


def test_a_loaded_adapter_can_be_mixed(tmp_path):
    first = model_with(PLAIN, PLAIN)
    for name in "ab":
        save_adapter(first, tmp_path, name)
    second = tiny_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()
    for name in "ab":
        load_adapter(second, tmp_path, name)
    with adapter_names(first, NAMES), adapter_names(second, NAMES):
        assert torch.equal(logits(first), logits(second))
