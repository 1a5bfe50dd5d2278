"""Tokens, batches and the order of an epoch."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from minilora import MiniloraError
from minilora.bert.data import (
    batches_in_order,
    collate_padded,
    epoch_order,
    split_rows,
    tokenize,
    training_updates,
)
from minilora.bert.tables import Row

COLLATE = functools.partial(collate_padded, pad_token_id=0)
CPU = torch.device("cpu")


def rows_of(texts, pairs=None):
    pairs = pairs or [None] * len(texts)
    return [Row(t, p, "0", None, i) for i, (t, p) in enumerate(zip(texts, pairs, strict=True), 1)]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("paired", [False, True])
def test_a_batch_is_what_transformers_collator_makes(tokenizer, paired):
    texts = ["it is good", "bad", "the plot was very very dull and the cast awful"]
    pairs = ["we loved it", "", "so long"] if paired else None
    labels = np.array([1, 0, 0])
    examples = tokenize(rows_of(texts, pairs), labels, tokenizer, 12, "tokenizing")
    encoded = tokenizer(texts, pairs, truncation=True, max_length=12)
    features = [{k: v[i] for k, v in encoded.items()} | {"label": labels[i]} for i in (2, 0, 1)]
    expected = DataCollatorWithPadding(tokenizer)(features)
    found = collate_padded(examples, np.array([2, 0, 1]), tokenizer.pad_token_id)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]) and found[name].dtype == torch.int64, name


def test_long_texts_are_cut_and_counted(tokenizer):
    examples = tokenize(rows_of(["bad " * 50, "bad"]), np.zeros(2, int), tokenizer, 8, "")
    assert np.diff(examples.offsets).tolist() == [8, 3]
    assert examples.truncated == 1


def test_the_order_of_an_epoch_is_accelerates():
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(23), data_seed=7)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert epoch_order(23, 7, epoch).tolist() == list(sampler)


def test_the_order_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    epoch_order(10, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (5, 1), (3, 2), (4, 4), (100, 1)])
def test_an_epoch_takes_each_example_once(tokenizer, batch_size, accumulation):
    count = 23
    examples = tokenize(rows_of(["bad"] * count), np.arange(count), tokenizer, 8, "")
    updates = training_updates(examples, 1, batch_size, accumulation, COLLATE, CPU)
    steps = list(updates(0, 0))
    seen = torch.cat([batch["labels"] for step in steps for batch in step]).tolist()
    assert sorted(seen) == list(range(count)) and seen != sorted(seen)
    assert all(len(step) <= accumulation for step in steps)
    for skip in range(len(steps)):
        rest = [[b["labels"].tolist() for b in step] for step in updates(0, skip)]
        assert rest == [[b["labels"].tolist() for b in step] for step in steps[skip:]]


def test_evaluation_keeps_the_files_order(tokenizer):
    examples = tokenize(rows_of(["bad"] * 7), np.arange(7), tokenizer, 8, "")
    batches = batches_in_order(examples, 3, COLLATE, CPU, "evaluating")
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_split_is_a_partition_that_depends_on_the_seed():
    rows = rows_of([str(i) for i in range(50)])
    train, validation = split_rows(rows, 0.2, seed=1)
    assert len(validation) == 10
    assert sorted(map(int, [r.text for r in train + validation])) == list(range(50))
    assert split_rows(rows, 0.2, seed=1) == (train, validation)
    assert split_rows(rows, 0.2, seed=2) != (train, validation)
    with pytest.raises(MiniloraError, match="leaves 0 for validation"):
        split_rows(rows, 0.001, seed=1)
