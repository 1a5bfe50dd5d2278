"""Tokens, batches and the order of an epoch."""

import functools
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from minilora import TrainConfig
from minilora.bert.dataset import (
    batches_in_order,
    collate_padded,
    epoch_batches,
    epoch_order,
    tokenize,
)
from minilora.bert.rows import Row
from minilora.bert.stored_rows import CHUNK
from minilora.training.distributed import trainers_batches
from tests.conftest import task_of

COLLATE = functools.partial(collate_padded, pad_token_id=0)
CPU = torch.device("cpu")
TASK = task_of("sequence_classification", ["0", "1"])


def rows_of(texts, pairs=None, labels=None):
    pairs, labels = pairs or [None] * len(texts), labels or ["0"] * len(texts)
    numbered = enumerate(zip(texts, pairs, labels, strict=True), start=1)
    return [Row(text, pair, label, None, line) for line, (text, pair, label) in numbered]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("paired", [False, True])
def test_a_batch_is_what_transformers_collator_makes(tokenizer, paired, side, multiple):
    tokenizer.padding_side = side
    texts = ["it is good", "bad", "the plot was very very dull and the cast awful"]
    pairs = ["we loved it", "", "so long"] if paired else None
    labels = ["1", "0", "0"]
    examples = tokenize(rows_of(texts, pairs, labels), TASK, tokenizer, 12, "f")
    encoded = tokenizer(texts, pairs, truncation=True, max_length=12)
    features = [{k: v[i] for k, v in encoded.items()} for i in (2, 0, 1)]
    for feature, i in zip(features, (2, 0, 1), strict=True):
        feature["label"] = int(labels[i])
    expected = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)(features)
    found = collate_padded(examples, np.array([2, 0, 1]), tokenizer.pad_token_id, side, multiple)
    assert found.pop("example").tolist() == [2, 0, 1]
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]) and found[name].dtype == torch.int64, name


def test_long_texts_are_cut_and_counted(tokenizer):
    examples = tokenize(rows_of(["bad " * 50, "bad"]), TASK, tokenizer, 8, "f")
    assert np.diff(examples.offsets).tolist() == [8, 3]
    assert examples.truncated == 1


def test_every_row_is_tokenised_however_many_there_are(tokenizer):
    rows = rows_of(["bad", "so dull"] * CHUNK, labels=["0", "1"] * CHUNK)
    examples = tokenize(rows, TASK, tokenizer, 8, "f")
    assert examples.row.tolist() == list(range(2 * CHUNK))
    assert np.diff(examples.offsets).tolist() == [3, 4] * CHUNK
    assert examples.labels.tolist() == [0, 1] * CHUNK


def test_a_task_may_make_several_examples_of_a_row(tokenizer):
    """The seam for long texts in windows: labels, rows and batches follow the examples."""

    class Windows(type(TASK)):
        def encode(self, rows, *arguments):
            return super().encode([row for row in rows for _ in range(2)], *arguments) | {
                "row": np.repeat(np.arange(len(rows)), 2)
            }

    rows = rows_of(["bad", "good"], labels=["0", "1"])
    examples = tokenize(rows, Windows(TrainConfig(), ["0", "1"]), tokenizer, 9, "f")
    assert len(examples) == 4
    assert COLLATE(examples, np.array([3, 0]))["example"].tolist() == [3, 0]
    assert examples.row.tolist() == [0, 0, 1, 1]


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
    examples = tokenize(rows_of(["bad"] * count), TASK, tokenizer, 8, "f")
    order, per_step = epoch_order(count, 1, 0), batch_size * accumulation

    def taken(order):
        how = (per_step, partial(trainers_batches, batch_size=batch_size), COLLATE, CPU)
        steps = epoch_batches(examples, order, *how)
        return [[batch["example"].tolist() for batch in step] for step in steps]

    steps = taken(order)
    seen = [row for step in steps for batch in step for row in batch]
    assert seen == order.tolist()
    assert all(len(step) <= accumulation for step in steps)
    assert all(len(batch) == batch_size for step in steps for batch in step[:-1])
    for skip in range(len(steps)):
        assert taken(order[skip * per_step :]) == steps[skip:]


def test_evaluation_keeps_the_files_order(tokenizer):
    examples = tokenize(rows_of(["bad"] * 7), TASK, tokenizer, 8, "f")
    batches = batches_in_order(examples, 3, COLLATE, CPU, "evaluating")
    assert [batch["example"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("pairs", [None, ["so long"] * 2])
def test_a_text_that_just_fits_is_not_cut(tokenizer, pairs):
    rows = rows_of(["bad bad bad", "bad bad bad bad"], pairs, labels=["0", "1"])
    examples = tokenize(rows, TASK, tokenizer, 5 if pairs is None else 8, "f")
    assert np.diff(examples.offsets).tolist() == [5, 5] if pairs is None else [8, 8]
    assert examples.truncated == 1
