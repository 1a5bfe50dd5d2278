"""Attention over a packed row, and how its tokens lie."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import set_seed

from minilora.bert.examples import Examples
from minilora.bert.packing import attention, collate_packed, layout_of

PAD = 0


def examples_of(lengths, vocabulary=30, with_types=True):
    draw = np.random.default_rng(0)
    total = sum(lengths)
    return Examples(
        input_ids=draw.integers(5, vocabulary, total).astype(np.int32),
        token_type_ids=draw.integers(0, 2, total).astype(np.int8) if with_types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=draw.integers(0, 3, len(lengths)),
        row=np.arange(len(lengths)),
        truncated=0,
    )


def test_a_row_is_the_texts_end_to_end_by_length_and_says_where_each_is():
    examples, indices = examples_of([7, 3, 5, 3]), np.array([2, 0, 3])
    batch = collate_packed(examples, indices, PAD, 1)
    row = batch["input_ids"].split(batch["lengths"].tolist())
    positions = batch["position_ids"].split(batch["lengths"].tolist())
    assert batch["lengths"].tolist() == [3, 5, 7]
    for example, place in zip(indices, batch["place"], strict=True):
        start, end = examples.offsets[example : example + 2]
        assert row[place].tolist() == examples.input_ids[start:end].tolist()
        assert positions[place].tolist() == list(range(end - start))
    assert batch["labels"].tolist() == examples.labels[indices].tolist()
    assert batch["example"].tolist() == indices.tolist()


def test_a_row_is_filled_up_to_a_multiple():
    batch = collate_packed(examples_of([3, 5]), np.array([1, 0]), PAD, 64)
    assert batch["input_ids"].shape == (64,) and batch["lengths"].tolist() == [3, 5]
    assert set(batch["input_ids"][8:].tolist()) == {PAD}


@pytest.mark.parametrize("filler", [0, 6])
def test_attention_is_torchs_own_within_each_sequence(filler):
    """Oracle: `scaled_dot_product_attention` on one sequence at a time."""
    lengths, heads, hidden = torch.tensor([2, 3, 3, 5, 8, 13]), 4, 32
    set_seed(0)
    q, k, v = torch.randn(3, 34 + filler, hidden)
    layout, off = layout_of(lengths, heads), nn.Dropout(0.5).eval()
    found = attention((q, k, v), layout, off, 8**-0.5)
    first = attention((q[layout.first], k, v), layout, off, 8**-0.5)
    assert len(found) == 34 + filler and not found[34:].any()
    for number, (start, length) in enumerate(zip(layout.first, lengths, strict=True)):
        rows = slice(int(start), int(start + length))
        one = [x[rows].unflatten(1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]
        expected = nn.functional.scaled_dot_product_attention(*one).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[rows], expected)
        torch.testing.assert_close(first[number], expected[0])


def test_probabilities_are_dropped():
    """With the values all one, a result is the sum of what was kept: torch's masks, its scaling."""
    lengths = torch.tensor([4, 4])
    ones, layout = torch.ones(8, 8), layout_of(lengths, 2)
    kept = attention((ones, ones, ones), layout, nn.Dropout(0.5), 0.5).unique()
    assert set(kept.tolist()) <= {0.0, 0.5, 1.0, 1.5, 2.0} and len(kept) > 1
