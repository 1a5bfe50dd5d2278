"""Every family with every head: packed, it is what transformers' own forward makes of it padded."""

import copy
import json
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    set_seed,
)

import minilora
from minilora.bert import forward as forward_room
from minilora.bert import interface
from minilora.bert.dataset import token_positions
from minilora.bert.dropout import FastDropout, MaskStream, use_fast_dropout
from minilora.bert.examples import Examples
from minilora.bert.forward import Packed, Padded, can_pack
from minilora.bert.packing import attention, layout_of
from tests.conftest import recompute

PAD, VOCABULARY = 0, 60
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 130, "embedding_size": 16, "vocab_size": VOCABULARY,
    "pad_token_id": PAD, "initializer_range": 0.2, "type_vocab_size": 2,
}  # fmt: skip
OF_DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
# DeBERTa's version 3, and its parts alone; buckets and windows that the texts are longer than.
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
WINDOW = {"local_attention": 8, "reference_compile": False}
FAMILIES = {
    "bert": {}, "roberta": {}, "xlm-roberta": {}, "camembert": {}, "electra": {},
    "distilbert": OF_DISTILBERT, "mpnet": {},
    "albert": {"inner_group_num": 2, "num_hidden_groups": 3},
    "deberta-v2": {},
    "deberta-v2 3": {**RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm",
                     "position_biased_input": False, "type_vocab_size": 0},
    "deberta-v2 own keys": {**RELATIVE, "position_buckets": -1},
    "deberta-v2 one part": {**RELATIVE, "pos_att_type": ["p2c"]},
    "modernbert": WINDOW, "modernbert of means": {**WINDOW, "classifier_pooling": "mean"},
}  # fmt: skip
HEADS = {
    "sequences": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "tokens": (AutoModelForTokenClassification, "TOKEN_CLS"),
    "answers": (AutoModelForQuestionAnswering, "QUESTION_ANS"),
    "masked": (AutoModelForMaskedLM, None),
}
SENTENCES = Path(forward_room.__file__).parent / "sentences"


def texts(with_types):
    """Sentences of the package, a word a token: of one word, of four, whole, and five in one."""
    lines = sorted(SENTENCES.glob("*.tsv"))[0].read_text().splitlines()[1:13]
    words = [line.split() for line in lines]
    words = [words[0][:1], words[1][:4], *words[2:6], [*chain(*words[6:11])], words[11]]
    ids = [[5 + zlib.crc32(word.encode()) % (VOCABULARY - 5) for word in text] for text in words]
    lengths = np.array([len(text) for text in ids])
    assert lengths.max() > 60 and len(set(lengths)) > 5
    return Examples(
        input_ids=np.concatenate(ids).astype(np.int32),
        token_type_ids=np.concatenate([np.arange(n) % 2 for n in lengths]).astype(np.int8)
        if with_types
        else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.arange(len(lengths)) % 3,
        row=np.arange(len(lengths)),
        truncated=0,
    )


def adapted(family, head, dtype=torch.float64, dropout=0.0, **settings):
    """A random model of the family with the head, its adapter's B not zero, in training mode."""
    auto_class, task_type = HEADS[head]
    name = family.split()[0]
    set_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **FAMILIES[family], "num_labels": 3})
    if head == "answers":
        config.num_labels = 2
    model = auto_class.from_config(config).to(dtype)
    lora = minilora.LoraConfig(task_type=task_type, lora_dropout=dropout, **settings)
    minilora.add_adapter(model, lora)
    set_seed(1)
    for _, parameter in minilora.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.train()


def packed_places(batch, examples, indices):
    """Of each token of the batch's row, its place among the examples' tokens: (N,)."""
    ordered = indices[np.argsort(batch["place"].numpy())]
    return token_positions(examples.offsets[ordered], batch["lengths"].numpy())


def padded_places(batch, examples, indices):
    """The same of a padded batch's tokens that are there, and where in it they are."""
    lengths = batch["attention_mask"].sum(1).numpy()
    flat = batch["attention_mask"].flatten().nonzero()[:, 0]
    return token_positions(examples.offsets[indices], lengths), flat


def outcome(forward, head, examples, indices):
    """(logits, gradients): logits of all sequences, or tokens, or every third token, in the order
    of the examples.
    """
    forward.zero_grad()
    batch = forward.collate(examples, indices)
    if isinstance(forward, Packed):
        places = packed_places(batch, examples, indices)
        flat = torch.arange(len(places))
    else:
        places, flat = padded_places(batch, examples, indices)
    order = torch.from_numpy(np.argsort(places))
    if head == "masked":
        batch["masked"] = flat[order][::3]
        logits = forward(batch)
    elif head == "sequences":
        logits = forward(batch)[np.argsort(indices)]
    else:
        logits = forward(batch)
        logits = (logits if isinstance(forward, Packed) else logits.flatten(0, 1))[flat[order]]
    draw = torch.Generator().manual_seed(3)
    weights = torch.randn(logits.shape, generator=draw, dtype=torch.float32)
    (logits * weights).sum().backward()
    gradients = {name: p.grad for name, p in minilora.trainable_parameters(forward.model)}
    return logits.detach(), gradients


def assert_same(found, expected, tolerance):
    """To a tolerance relative to the size of the logits, and of each gradient."""
    torch.testing.assert_close(
        found[0], expected[0], rtol=0, atol=tolerance * expected[0].abs().max().item()
    )
    assert found[1].keys() == expected[1].keys() and expected[1]
    largest = max(g.abs().max().item() for g in expected[1].values() if g is not None)
    for name, theirs in expected[1].items():
        ours = found[1][name]
        if theirs is None or ours is None:  # nothing the loss depends on
            assert theirs is None or not theirs.any()
            assert ours is None or not ours.any()
            continue
        # A key's bias moves all scores of a query alike, and so has no gradient but rounding.
        size = max(theirs.abs().max().item(), 1e-2 * largest)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * size, msg=name)


def compare(family, head, dtype=torch.float64, multiple=1, again=False, **settings):
    model = adapted(family, head, dtype, **settings)
    examples = texts(with_types=family not in ("roberta", "deberta-v2 3"))
    indices = np.random.default_rng(1).permutation(len(examples))
    expected = outcome(Padded(copy.deepcopy(model), PAD), head, examples, indices)
    assert can_pack(model)
    if again:
        recompute(model)
    found = outcome(Packed(model, PAD, multiple), head, examples, indices)
    # ModernBERT rotates in float32, and a scale of DeBERTa's is float32.
    rounded = family.split()[0] in ("modernbert", "deberta-v2")
    tolerance = 2e-6 if rounded else 1e-9
    assert_same(found, expected, tolerance if dtype == torch.float64 else 1e-4)


ALL = [(family, head) for family in FAMILIES for head in HEADS]
SOME = [
    ("bert", "tokens"), ("roberta", "answers"), ("electra", "masked"), ("distilbert", "tokens"),
    ("albert", "sequences"), ("mpnet", "masked"), ("deberta-v2 3", "sequences"),
    ("modernbert", "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "head"), SOME)
def test_packed_logits_and_gradients_are_the_padded_ones(family, head):
    compare(family, head, target_modules="all-linear")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "again"),
    [(torch.float64, False), (torch.float64, True), (torch.float32, False)],
    ids=["float64", "float64, recomputed", "float32"],
)
@pytest.mark.parametrize(("family", "head"), ALL)
def test_every_family_with_every_head(family, head, dtype, again):
    if again and family.split()[0] in ("mpnet", "albert"):
        pytest.skip("transformers has no gradient checkpointing for it")
    compare(family, head, dtype, again=again, target_modules="all-linear")
    compare(family, head, dtype, again=again, multiple=64, bias="all")


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2 3", "distilbert", "modernbert"])
def test_attention_across_sequences_would_be_seen(family, monkeypatch):
    """Negative control of the comparison: the row as one long sequence."""

    def one_sequence(lengths, heads):
        return layout_of(lengths.sum()[None], heads)

    monkeypatch.setattr(forward_room, "layout_of", one_sequence)
    with pytest.raises(AssertionError, match="not close"):
        compare(family, "tokens")


def test_a_window_that_is_one_token_wider_would_be_seen(monkeypatch):
    within = interface.within
    monkeypatch.setattr(interface, "within", lambda window, q, k: within(window + 1, q, k))
    with pytest.raises(AssertionError, match="not close"):
        compare("modernbert", "tokens")


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_padded_logits_of_masked_places_are_the_whole_models(family):
    model = adapted(family, "masked")
    padded, examples = Padded(model, PAD), texts(with_types=False)
    batch = padded.collate(examples, np.arange(len(examples)))
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    batch["masked"] = torch.tensor([3, 0, batch["input_ids"].shape[1] * 2 + 5])
    found = padded(batch)
    torch.testing.assert_close(found, whole.flatten(0, 1)[batch["masked"]])


class WidestOf(TorchDispatchMode):
    """The most rows that a tensor as wide as the vocabulary had."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and VOCABULARY in result.shape:
            self.rows = max(self.rows, result.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("forward", [Packed, Padded])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_tokens_times_vocabulary_is_computed(forward, family):
    """The weight itself has as many rows as the model is wide."""
    examples = texts(with_types=False)
    model = forward(adapted(family, "masked"), PAD)
    batch = model.collate(examples, np.arange(len(examples)))
    batch["masked"] = torch.arange(SIZES["hidden_size"])
    with WidestOf() as widest:
        model(batch).sum().backward()
    assert widest.rows == SIZES["hidden_size"] < len(examples.input_ids)


@pytest.mark.parametrize(
    ("family", "block"),
    [("mpnet", "attention"), ("deberta-v2", "intermediate"), ("distilbert", "attention"),
     ("albert", "albert_layers.0"), ("modernbert", "attn"), ("modernbert", "layers.0")],
)  # fmt: skip
def test_a_block_that_is_trained_in_full_is_not_packed(family, block):
    """Its copy has other names, or a config of its own, which asks for other attention."""
    embeddings = ["word_embeddings", "tok_embeddings"]
    model = adapted(family, "tokens", target_modules=embeddings, modules_to_save=[block])
    assert not can_pack(model)


@pytest.mark.parametrize(("family", "head"), [("modernbert", "head"), ("distilbert", "embeddings")])
def test_a_head_and_embeddings_may_be_trained_in_full(family, head):
    compare(family, "sequences", modules_to_save=[head])


@pytest.mark.parametrize("family", ["distilbert", "albert", "modernbert"])
def test_a_model_whose_attention_cannot_be_exchanged_is_not_packed(family, monkeypatch):
    """transformers only logs it then, and keeps its own attention, over the whole row."""
    model, no = adapted(family, "tokens"), classmethod(lambda cls: False)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", no)
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == kept != "eager"
    assert not can_pack(model)


def test_a_deberta_with_a_convolution_is_not_packed():
    config = AutoConfig.for_model("deberta-v2", **SIZES, conv_kernel_size=3)
    assert not can_pack(AutoModelForTokenClassification.from_config(config))


@pytest.mark.parametrize("family", ["distilbert", "albert", "modernbert"])
def test_a_packed_model_is_itself_for_others(family, tmp_path):
    """Its own forward, which takes no layout, and its files."""
    model = adapted(family, "tokens", torch.float32).eval()
    padded, examples = Padded(model, PAD), texts(with_types=False)
    batch = padded.collate(examples, np.arange(len(examples)))
    expected = padded(batch)
    Packed(model, PAD)
    torch.testing.assert_close(padded(batch), expected)
    assert "minilora" not in json.dumps(model.config.to_dict())


@pytest.mark.parametrize("fast", [True, False], ids=["fast dropout", "torch dropout"])
@pytest.mark.parametrize("family", ["deberta-v2 3", "distilbert", "modernbert"])
def test_recomputed_activations_draw_the_same_masks(family, fast, monkeypatch):
    monkeypatch.setitem(FAMILIES, "modernbert", {**WINDOW, "attention_dropout": 0.1})
    examples, found = texts(with_types=False), []
    for again in (False, True):
        model, stream = adapted(family, "tokens", torch.float32, dropout=0.1), MaskStream(3)
        if fast:
            use_fast_dropout(model, stream)
        if again:
            recompute(model, **{"context_fn": stream.checkpoint_contexts} if fast else {})
        set_seed(5)
        forward = Packed(model, PAD)
        indices = np.arange(len(examples))
        found.append([outcome(forward, "tokens", examples, indices) for _ in range(2)])
        assert not torch.equal(found[-1][0][0], found[-1][1][0])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept[0], recomputed[0])
        assert all(torch.equal(kept[1][name], recomputed[1][name]) for name in kept[1])


@pytest.mark.parametrize(
    ("family", "name"),
    [("distilbert", "dropout"), ("albert", "attention_dropout"), ("modernbert", "out_drop")],
)
def test_attention_probabilities_are_dropped(family, name, monkeypatch):
    """By the module that the family has for it, torch's or the one that took its place."""
    monkeypatch.setitem(FAMILIES, "modernbert", {**WINDOW, "attention_dropout": 0.1})
    asked = []
    monkeypatch.setattr(
        interface, "attention", lambda *given: asked.append(given[2]) or attention(*given)
    )
    model = adapted(family, "tokens", dropout=0.1)
    use_fast_dropout(model, MaskStream(0))
    examples = texts(with_types=False)
    packed = Packed(model, PAD)
    packed(packed.collate(examples, np.arange(3)))
    own = [
        m for key, m in model.named_modules() if key.endswith((f"attention.{name}", f"attn.{name}"))
    ]
    assert {id(module) for module in asked} == {id(module) for module in own} != set()
    assert all(isinstance(module, FastDropout) and module.p == 0.1 for module in own)
