"""Padding-free batches agree with padded ones: logits, losses, every gradient."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
    set_seed,
)

import minilora
from minilora.bert.batching import packed_batching, padded_batching
from minilora.bert.data import Examples
from minilora.bert.dropout import MaskStream, use_fast_dropout
from minilora.bert.packing import attention, collate_packed, layout_of
from minilora.bert.recomputation import recompute_activations
from minilora.lora.base_precision import linear_in_base_precision, train_modules_in_float32
from tests.conftest import tiny_config

PAD = 0
LENGTHS = {
    "ragged": [7, 3, 20, 11, 3, 9, 5, 5, 16, 4, 2],
    "all equal": [6] * 5,
    "one": [9],
    "two": [2, 40],
    "nearly equal": [8, 8, 8, 8, 8, 9],
}


def examples_of(lengths, vocabulary=30, with_types=True):
    draw = np.random.default_rng(0)
    total = sum(lengths)
    return Examples(
        input_ids=draw.integers(5, vocabulary, total).astype(np.int32),
        token_type_ids=draw.integers(0, 2, total).astype(np.int8) if with_types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=draw.integers(0, 3, len(lengths)),
        truncated=0,
    )


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


def bert(**changes):
    set_seed(0)
    return BertForSequenceClassification(tiny_config(num_labels=3, **changes))


def loss_and_gradients(model, batching, examples, indices):
    model.zero_grad()
    batch = batching.collate(examples, indices)
    logits = batching.forward(model, batch)
    loss = nn.functional.cross_entropy(logits.float(), batch["labels"])
    loss.backward()
    return logits.detach(), loss.detach(), [p.grad for _, p in minilora.trainable_parameters(model)]


def assert_agree(model, examples, multiple=1, rtol=1e-5, atol=1e-6):
    indices = np.random.default_rng(1).permutation(len(examples))
    # Padded first: packing a relative reroutes its attention.
    expected = loss_and_gradients(model, padded_batching(PAD), examples, indices)
    packed = packed_batching(model, PAD, linear_in_base_precision, multiple)
    assert packed is not None
    found = loss_and_gradients(model, packed, examples, indices)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    assert len(found[2]) == len(expected[2]) > 0
    largest = max(gradient.abs().max().item() for gradient in expected[2])
    for ours, theirs in zip(found[2], expected[2], strict=True):
        # Relative to each tensor's own size, for single elements may cancel to nothing; a key's bias
        # does so as a whole, since a softmax does not see what is added to all scores.
        size = max(theirs.abs().max().item(), 1e-5 * largest)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * rtol * size)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_logits_losses_and_gradients_are_the_padded_ones(lengths):
    """To float32 rounding, in the batch's own order."""
    assert_agree(adapted(bert()), examples_of(lengths))


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
def test_whatever_is_adapted_packed_agrees_with_padded(settings):
    assert_agree(adapted(bert(), **settings), examples_of(LENGTHS["ragged"]))


def test_filler_at_the_end_of_the_row_changes_nothing():
    assert_agree(adapted(bert()), examples_of(LENGTHS["ragged"]), multiple=64)
    batch = collate_packed(examples_of([3, 5]), np.array([1, 0]), PAD, 64)
    assert batch["input_ids"].shape == (64,) and batch["lengths"].tolist() == [3, 5]


def test_a_whole_block_trained_in_full_is_not_walked():
    """Its parts have other names then; such a model is padded."""
    model = adapted(bert(), modules_to_save=["intermediate"])
    assert packed_batching(model, PAD, linear_in_base_precision, 1) is None


RELATIVES = {
    "roberta": (RobertaConfig, {"pad_token_id": PAD}),
    "xlm-roberta": (XLMRobertaConfig, {"pad_token_id": PAD}),
    "camembert": (CamembertConfig, {"pad_token_id": PAD}),
    "electra": (ElectraConfig, {"embedding_size": 32}),
}


@pytest.mark.parametrize(("config_class", "extra"), RELATIVES.values(), ids=RELATIVES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_packed_relatives_agree_with_padded_ones(config_class, extra, recompute):
    set_seed(0)
    common = {k: v for k, v in tiny_config().to_dict().items() if k in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "intermediate_size", "max_position_embeddings",
    )}  # fmt: skip
    config = config_class(**{**common, "num_labels": 3, "type_vocab_size": 2, **extra})
    model = adapted(AutoModelForSequenceClassification.from_config(config))
    if recompute:
        recompute_activations(model, None)
    assert_agree(model, examples_of(LENGTHS["ragged"]))


def test_a_family_that_is_not_known_is_not_packed():
    config = DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64, vocab_size=30)
    model = adapted(AutoModelForSequenceClassification.from_config(config))
    assert packed_batching(model, PAD, linear_in_base_precision, 1) is None


def test_attention_is_torchs_own_within_each_sequence():
    """Oracle: `scaled_dot_product_attention` on one sequence at a time."""
    lengths, heads, hidden = torch.tensor([2, 3, 3, 5, 8, 13]), 4, 32
    set_seed(0)
    q, k, v = torch.randn(3, 34, hidden)
    layout = layout_of(lengths)
    found = attention(q, k, v, layout, heads, nn.Dropout(0.5).eval())
    first = attention(q[layout.first], k, v, layout, heads, nn.Dropout(0.0), first_only=True)
    for number, (start, length) in enumerate(zip(layout.first, lengths, strict=True)):
        rows = slice(int(start), int(start + length))
        one = [x[rows].unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]
        expected = nn.functional.scaled_dot_product_attention(*one).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[rows], expected)
        torch.testing.assert_close(first[number], expected[0])


def test_a_sequence_does_not_see_its_neighbours():
    """Negative control for the whole idea: another neighbour, the same logits; another token of its
    own, others.
    """
    model = adapted(bert(initializer_range=0.2)).eval()
    batching = packed_batching(model, PAD, linear_in_base_precision, 1)

    def logits(examples):
        return batching.forward(model, batching.collate(examples, np.arange(len(examples))))

    examples = examples_of([6, 4, 9])
    before = logits(examples)
    examples.input_ids[6:] = 7  # the second and third
    assert torch.allclose(logits(examples)[0], before[0], atol=1e-6)
    assert not torch.allclose(logits(examples)[1:], before[1:], atol=1e-4)
    examples.input_ids[1] = 8
    assert not torch.allclose(logits(examples)[0], before[0], atol=1e-4)


@pytest.mark.parametrize("fast", [True, False], ids=["fast dropout", "torch dropout"])
def test_recomputed_activations_give_bitwise_the_same_gradients(fast):
    """With dropout on: the same masks are drawn again, and the stream goes on where it was."""
    found = []
    for recompute in (False, True):
        model = bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        set_seed(1)
        minilora.add_adapter(model, minilora.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1))
        stream = MaskStream(3)
        if fast:
            use_fast_dropout(model, stream)
        if recompute:
            recompute_activations(model, stream.checkpoint_contexts if fast else None)
        model.train()
        batching = packed_batching(model, PAD, linear_in_base_precision, 1)
        examples, indices = examples_of(LENGTHS["ragged"]), np.arange(11)
        first = loss_and_gradients(model, batching, examples, indices)
        second = loss_and_gradients(model, batching, examples, indices)
        found.append((first, second))
        assert not torch.equal(first[1], second[1])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept[1], recomputed[1])
        assert all(torch.equal(a, b) for a, b in zip(kept[2], recomputed[2], strict=True))


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=str)
def test_bfloat16_agrees_with_float32_to_its_precision(targets):
    """8 bits of mantissa: 1 percent of the logits' spread, 5 percent of each gradient's norm."""
    model, half = (adapted(bert(), target_modules=targets) for _ in range(2))
    tensors = minilora.adapter_state_dict(model)
    half = bert().to(torch.bfloat16)
    set_seed(1)
    minilora.add_adapter(half, minilora.LoraConfig(task_type="SEQ_CLS", target_modules=targets))
    train_modules_in_float32(half)
    for key, tensor in minilora.adapter_state_dict(half).items():
        tensor.copy_(tensors[key])
    for module in half.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    half.train()
    examples, indices = examples_of(LENGTHS["ragged"]), np.arange(11)
    exact = loss_and_gradients(
        model, packed_batching(model, PAD, linear_in_base_precision, 1), examples, indices
    )
    found = loss_and_gradients(
        half, packed_batching(half, PAD, linear_in_base_precision, 64), examples, indices
    )
    assert found[0].dtype == torch.float32
    assert (found[0] - exact[0]).abs().max() < 0.01 * (exact[0].max() - exact[0].min())
    for ours, theirs in zip(found[2], exact[2], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
