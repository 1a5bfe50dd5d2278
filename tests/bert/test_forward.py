"""Padding-free batches agree with padded ones: logits, losses, every gradient."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    CamembertConfig,
    ElectraConfig,
    MegatronBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
    set_seed,
)

import minilora
from minilora.bert.dropout import MaskStream, use_fast_dropout
from minilora.bert.forward import Packed, Padded, can_pack
from minilora.lora.adapters import set_fused
from minilora.lora.heads import train_heads_in_float32
from tests.bert.test_packing import PAD, examples_of
from tests.conftest import recompute, tiny_config

LENGTHS = {
    "ragged": [7, 3, 20, 11, 3, 9, 5, 5, 16, 4, 2],
    "all equal": [6] * 5,
    "one": [9],
    "two": [2, 40],
    "nearly equal": [8, 8, 8, 8, 8, 9],
}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "intermediate_size", "max_position_embeddings")  # fmt: skip
# Padding ids as the families' own models have them, and so not the same for all.
FAMILIES = {
    "bert": (BertConfig, {}),
    "roberta": (RobertaConfig, {"pad_token_id": 1}),
    "xlm-roberta": (XLMRobertaConfig, {"pad_token_id": 1}),
    "camembert": (CamembertConfig, {"pad_token_id": 1}),
    "electra": (ElectraConfig, {"embedding_size": 32}),
    "electra of two sizes": (ElectraConfig, {"embedding_size": 16}),
}


def classifier(family="bert", **changes):
    set_seed(0)
    config_class, extra = FAMILIES[family]
    sizes = {name: getattr(tiny_config(), name) for name in SIZES}
    config = config_class(**{**sizes, "num_labels": 3, "type_vocab_size": 2, **extra, **changes})
    return AutoModelForSequenceClassification.from_config(config)


def adapted(model, **settings):
    """`model` with an adapter whose B is not zero, in training mode, every dropout off."""
    set_seed(1)
    minilora.add_adapter(model, minilora.LoraConfig(task_type="SEQ_CLS", **settings))
    for _, parameter in minilora.trainable_parameters(model):
        parameter.data += 0.02 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def loss_and_gradients(forward, examples, indices):
    forward.zero_grad()
    batch = forward.collate(examples, indices)
    logits = forward(batch)
    loss = nn.functional.cross_entropy(logits.float(), batch["labels"])
    loss.backward()
    gradients = [p.grad for _, p in minilora.trainable_parameters(forward.model)]
    return logits.detach(), loss.detach(), gradients


def assert_agree(model, examples, multiple=1, pad_token_id=PAD):
    indices = np.random.default_rng(1).permutation(len(examples))
    assert can_pack(model)
    expected = loss_and_gradients(Padded(model, pad_token_id), examples, indices)
    found = loss_and_gradients(Packed(model, pad_token_id, multiple), examples, indices)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(found[2]) == len(expected[2]) > 0
    largest = max(gradient.abs().max().item() for gradient in expected[2])
    for ours, theirs in zip(found[2], expected[2], strict=True):
        # Relative to each tensor's own size, for single elements may cancel to nothing; a key's
        # bias does so as a whole, since a softmax does not see what is added to all scores.
        size = max(theirs.abs().max().item(), 1e-5 * largest)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_logits_losses_and_gradients_are_the_padded_ones(lengths):
    """To float32 rounding, in the batch's own order."""
    assert_agree(adapted(classifier()), examples_of(lengths))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["word_embeddings", "query", "dense"], "use_dora": True},
        {"modules_to_save": ["pooler", "LayerNorm"], "bias": "all"},
        {"target_modules": ["value"], "layers_to_transform": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True], ids=["PEFT's order", "fused"])
def test_whatever_is_adapted_packed_agrees_with_padded(settings, fused):
    model = adapted(classifier(), **settings)
    set_fused(model, fused)
    assert_agree(model, examples_of(LENGTHS["ragged"]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_every_family_packed_agrees_with_itself_padded(family, again):
    model = adapted(classifier(family), target_modules="all-linear")
    if again:
        recompute(model)
    assert_agree(model, examples_of(LENGTHS["ragged"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_token_types_and_with_filler_agrees_too(family):
    examples = examples_of(LENGTHS["ragged"], with_types=False)
    pad_token_id = FAMILIES[family][1].get("pad_token_id", PAD)
    assert_agree(adapted(classifier(family)), examples, multiple=64, pad_token_id=pad_token_id)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_tokens_inside_a_text_agree_too(family):
    """RoBERTa does not count them as positions."""
    examples = examples_of([9, 6, 6, 12])
    examples.input_ids[[2, 3, 14, 32]] = FAMILIES[family][1].get("pad_token_id", PAD)
    assert_agree(adapted(classifier(family)), examples)


def test_the_trained_head_agrees_in_evaluation_with_transformers_on_each_text_alone():
    model = classifier("roberta").eval()
    examples = examples_of([6, 4, 9])
    packed = Packed(model, 1)
    with torch.no_grad():
        found = packed(packed.collate(examples, np.array([2, 0, 1])))
        for index, logits in zip((2, 0, 1), found, strict=True):
            start, end = examples.offsets[index : index + 2]
            ids, types = (
                torch.from_numpy(array[start:end].astype(np.int64))[None]
                for array in (examples.input_ids, examples.token_type_ids)
            )
            expected = model(input_ids=ids, token_type_ids=types).logits[0]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", ["intermediate", "attention", "output", "layer.1", "encoder"])
def test_a_whole_block_trained_in_full_is_not_packed(block):
    """Its parts have other names then."""
    settings = {"target_modules": ["word_embeddings"], "modules_to_save": [block]}
    assert not can_pack(adapted(classifier(), **settings))


@pytest.mark.parametrize("block", ["embeddings", "pooler"])
def test_a_block_that_is_called_as_a_whole_may_be_trained_in_full(block):
    assert_agree(adapted(classifier(), modules_to_save=[block]), examples_of(LENGTHS["ragged"]))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("longformer", {"attention_window": 4}),
        ("luke", {"entity_vocab_size": 4, "entity_emb_size": 8}),
        ("ernie", {}),
    ],
)
def test_masked_words_are_told_by_heads_that_look_for_more_than_hidden_states(family, sizes):
    """Of the places alone, what the model's own forward says of all."""
    set_seed(0)
    widths = {name: getattr(tiny_config(), name) for name in SIZES}
    config = AutoConfig.for_model(family, **widths, **sizes, pad_token_id=PAD)
    model = AutoModelForMaskedLM.from_config(config).eval()
    batch = Padded(model, PAD).collate(examples_of([7, 3, 12]), np.arange(3))
    places = batch["attention_mask"].flatten().nonzero()[::3, 0]
    whole = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"masked": places}
    torch.testing.assert_close(Padded(model, PAD)(batch), whole[places])


def test_what_is_not_known_to_agree_is_not_packed():
    config = MegatronBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    assert not can_pack(AutoModelForSequenceClassification.from_config(config))
    assert not can_pack(classifier(is_decoder=True))
    assert not can_pack(classifier("roberta", pad_token_id=None))  # transformers cannot run it
    assert not can_pack(BertForNextSentencePrediction(tiny_config()))

    class Own(BertForSequenceClassification):
        pass

    assert can_pack(classifier()) and not can_pack(Own(tiny_config()))


def test_a_sequence_does_not_see_its_neighbours():
    """Negative control for the whole idea: another neighbour, the same logits; another token of its
    own, others.
    """
    packed = Packed(adapted(classifier(initializer_range=0.2)).eval(), PAD)

    def logits(examples):
        return packed(packed.collate(examples, np.arange(len(examples))))

    examples = examples_of([6, 4, 9])
    before = logits(examples)
    examples.input_ids[6:] = 7  # the second and third
    assert torch.allclose(logits(examples)[0], before[0], atol=1e-6)
    assert not torch.allclose(logits(examples)[1:], before[1:], atol=1e-4)
    examples.input_ids[1] = 8
    assert not torch.allclose(logits(examples)[0], before[0], atol=1e-4)


@pytest.mark.parametrize("fast", [True, False], ids=["fast dropout", "torch dropout"])
@pytest.mark.parametrize("batches", [Packed, Padded])
def test_recomputed_activations_give_bitwise_the_same_gradients(fast, batches):
    """With dropout on: the same masks are drawn again, and the stream goes on where it was."""
    found = []
    for again in (False, True):
        model = classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        set_seed(1)
        minilora.add_adapter(model, minilora.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1))
        stream = MaskStream(3)
        if fast:
            use_fast_dropout(model, stream)
        if again:
            recompute(model, **{"context_fn": stream.checkpoint_contexts} if fast else {})
        forward = batches(model.train(), PAD)
        examples, indices = examples_of(LENGTHS["ragged"]), np.arange(11)
        first = loss_and_gradients(forward, examples, indices)
        second = loss_and_gradients(forward, examples, indices)
        found.append((first, second))
        assert not torch.equal(first[1], second[1])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept[1], recomputed[1])
        assert all(torch.equal(a, b) for a, b in zip(kept[2], recomputed[2], strict=True))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "as PEFT"])
@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=str)
def test_what_saves_memory_changes_no_bit(targets, fused, monkeypatch):
    """Dropout in place of a layer's product, and what it gave made again."""
    found = []
    for saves in (True, False):
        model = classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        config = minilora.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1, target_modules=targets)
        minilora.add_adapter(model, config)
        for name, parameter in minilora.trainable_parameters(model):
            parameter.data += 0.02 * ("lora_B" in name)
        set_fused(model, fused)
        use_fast_dropout(model, MaskStream(3))
        in_place = [module for module in model.modules() if getattr(module, "in_place", False)]
        assert len(in_place) == 2 * model.config.num_hidden_layers
        if not saves:
            monkeypatch.setattr("minilora.bert.forward.made_again", contextlib.nullcontext)
            for module in in_place:
                module.in_place = False
        forward = Packed(model.train(), PAD)
        found.append(loss_and_gradients(forward, examples_of(LENGTHS["ragged"]), np.arange(11)))
    (_, loss, gradients), (_, expected, theirs) = found
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=str)
def test_bfloat16_agrees_with_float32_to_its_precision(targets):
    """8 bits of mantissa: 1 percent of the logits' spread, 5 percent of each gradient's norm."""
    model = adapted(classifier(), target_modules=targets)
    half = classifier().to(torch.bfloat16)
    half = adapted(half, target_modules=targets)
    train_heads_in_float32(half)
    tensors = minilora.adapter_state_dict(model)
    for key, tensor in minilora.adapter_state_dict(half).items():
        tensor.copy_(tensors[key])
    for one in (model, half):
        set_fused(one, True)
    examples, indices = examples_of(LENGTHS["ragged"]), np.arange(11)
    exact = loss_and_gradients(Packed(model, PAD), examples, indices)
    found = loss_and_gradients(Packed(half, PAD, 64), examples, indices)
    assert found[0].dtype == torch.float32
    assert (found[0] - exact[0]).abs().max() < 0.01 * (exact[0].max() - exact[0].min())
    for ours, theirs in zip(found[2], exact[2], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.slow
def test_a_compiled_walk_agrees():
    forward = Packed(adapted(classifier()), PAD)
    examples, indices = examples_of(LENGTHS["ragged"]), np.arange(11)
    expected = loss_and_gradients(forward, examples, indices)
    forward.compile()
    found = loss_and_gradients(forward, examples, indices)
    torch.testing.assert_close(found[0], expected[0])
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
