"""Exercise 6: the row against the padded batch, in transformers and in minilora."""

import pytest
import torch
import torch.nn.functional as F
from answers.ex6_packing import attend, may_see, pack, packed_logits
from transformers import BertConfig, BertForSequenceClassification

from minilora.bert.packing import attention, layout_of

SENTENCES = [[2, 7, 9, 3], [2, 5, 3], [2, 8, 8, 6, 9, 3]]
LENGTHS = [4, 3, 6]
N, H, D = 13, 2, 8


def bert() -> BertForSequenceClassification:
    """In float64, so that only a mistake makes a difference."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": D, "intermediate_size": 16}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=H, initializer_range=0.5, **sizes)
    return BertForSequenceClassification(config).double().eval()


def padded_logits(model) -> torch.Tensor:
    rows = [F.pad(torch.tensor(sentence), (0, 6 - len(sentence))) for sentence in SENTENCES]
    ids = torch.stack(rows)
    return model(input_ids=ids, attention_mask=(ids != 0).long()).logits


def queries_keys_values() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(H, N, D // H).double() for _ in range(3)]


def test_the_row_holds_every_token_and_no_padding():
    row = pack(SENTENCES)
    assert row.input_ids.tolist() == [2, 7, 9, 3, 2, 5, 3, 2, 8, 8, 6, 9, 3]
    assert row.input_ids.dtype == torch.int64, "embeddings want int64"
    assert row.segments.tolist() == [0] * 4 + [1] * 3 + [2] * 6, "segments: of which sentence"


def test_positions_begin_anew_in_each_sentence():
    found = pack(SENTENCES).position_ids.tolist()
    assert found == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5], (
        f"the positions are {found}. A sentence has the position embeddings that it has alone: "
        "0, 1, ... from its own first token"
    )


def test_each_sentences_first_token_is_known():
    assert pack(SENTENCES).first.tolist() == [0, 4, 7], "first: 0, and where each other begins"


def test_a_token_sees_its_own_sentence_and_no_other():
    seen = may_see(pack(SENTENCES).segments)
    assert seen.dtype == torch.bool and seen.shape == (N, N)
    blocks = torch.block_diag(*(torch.ones(length, length) for length in LENGTHS)).bool()
    assert not (seen & ~blocks).any(), "tokens of different sentences see each other"
    assert not (blocks & ~seen).any(), (
        "within a sentence every token sees every other, those behind it too: BERT is no decoder"
    )


def test_attention_is_that_of_each_sentence_alone():
    q, k, v = queries_keys_values()
    found = attend(q, k, v, torch.tensor([0] * 4 + [1] * 3 + [2] * 6))
    assert found.shape == q.shape, f"(H, N, d) -> (H, N, d), not {tuple(found.shape)}"
    parts = zip(*(x.split(LENGTHS, dim=1) for x in (q, k, v)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1)
    whole = F.scaled_dot_product_attention(q, k, v)
    assert not torch.allclose(found, whole), "every token sees the whole row: the mask does nothing"
    assert torch.allclose(found, expected), (
        "a sentence's result depends on its neighbours, or the scores are not divided by sqrt(d). "
        "Mask before the softmax, with -inf: zeros after it leave rows that do not add up to 1"
    )


def test_attention_is_minilora_s():
    q, k, v = queries_keys_values()
    order = [1, 0, 2]  # in minilora's row they lie by length
    starts = [0, 4, 7]
    places = [i for s in order for i in range(starts[s], starts[s] + LENGTHS[s])]
    rows = [x.transpose(0, 1).reshape(N, D)[places] for x in (q, k, v)]
    layout = layout_of(torch.tensor([LENGTHS[s] for s in order]), H)
    ours = attention(tuple(rows), layout, torch.nn.Identity(), (D // H) ** -0.5)
    found = attend(q, k, v, pack(SENTENCES).segments).transpose(0, 1).reshape(N, D)[places]
    assert torch.allclose(found, ours)


def test_the_logits_are_those_of_the_padded_batch():
    model = bert()
    found, expected = packed_logits(model, SENTENCES), padded_logits(model)
    assert found.shape == expected.shape == (3, 2), f"(B, C) = (3, 2), not {tuple(found.shape)}"
    wrong = [i for i in range(3) if not torch.allclose(found[i], expected[i])]
    assert not wrong, (
        f"sentences {wrong} have other logits than in the padded batch. Only 0 is right: the head "
        "read the row's first token, or positions run on. All are wrong: attention has no mask"
    )


def test_a_sentences_logits_do_not_depend_on_its_neighbours():
    model = bert()
    alone = torch.cat([packed_logits(model, [sentence]) for sentence in SENTENCES])
    assert torch.allclose(packed_logits(model, SENTENCES), alone)
    swapped = packed_logits(model, SENTENCES[::-1]).flip(0)
    assert torch.allclose(swapped, alone), "in another order the same sentences have other logits"


@pytest.mark.parametrize("layer", [0, 1])
def test_the_gradients_are_those_of_the_padded_batch(layer):
    found = []
    for logits_of in (lambda model: packed_logits(model, SENTENCES), padded_logits):
        model = bert()
        F.cross_entropy(logits_of(model), torch.tensor([0, 1, 0])).backward()
        found.append(model.bert.encoder.layer[layer].attention.self.query.weight.grad)
    assert found[0] is not None, "no gradient: is there a no_grad() or a detach()?"
    assert torch.allclose(*found), "the logits agree, and the gradients do not"
