"""Masked words: how texts become examples, which tokens are masked, what they cost."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, set_seed

from minilora import MiniloraError, TrainConfig
from minilora.bert.dataset import tokenize
from minilora.bert.examples import NO_LABEL
from minilora.bert.forward import Packed, Padded
from minilora.bert.rows import Row
from minilora.bert.tasks import varied
from minilora.training.evaluation import evaluate_model
from minilora.training.loop import Training, training_step
from minilora.training.optim import build_optimizer, build_scheduler
from tests.conftest import WORDS, task_of, tiny_config

CORPUS = Path(__file__).parents[3] / "examples" / "data" / "corpus.txt"


def texts_of(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def examples_of(texts, tokenizer, max_length=16, label=True, **arguments):
    """(task, examples) of texts, to be masked, or with label None to be filled."""
    task = task_of("masked_lm", **arguments)
    rows = [Row(text, None, label, None, line) for line, text in enumerate(texts, start=1)]
    return task, tokenize(rows, task, tokenizer, max_length, "f", keep=False)


def parts(examples):
    return [part.tolist() for part in np.split(examples.input_ids, examples.offsets[1:-1])]


def test_by_default_texts_are_put_end_to_end_and_cut_in_blocks_of_max_length(tokenizer):
    texts = texts_of(30)
    whole = [index for ids in tokenizer(texts)["input_ids"] for index in ids]
    _, examples = examples_of(texts, tokenizer)
    assert parts(examples) == [whole[i : i + 16] for i in range(0, len(whole), 16)]
    assert examples.truncated == 0 and len(whole) % 16  # the last is short
    begins = np.cumsum([0, *map(len, tokenizer(texts)["input_ids"])])
    assert [begins[row] <= 16 * i < begins[row + 1] for i, row in enumerate(examples.row)]


def test_line_by_line_a_text_is_an_example(tokenizer):
    texts = texts_of(30)
    _, examples = examples_of(texts, tokenizer, line_by_line=True)
    assert parts(examples) == tokenizer(texts, truncation=True, max_length=16)["input_ids"]
    assert examples.truncated == sum(len(ids) > 16 for ids in tokenizer(texts)["input_ids"])


def test_a_txt_file_has_a_text_a_line_and_blank_ones_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("one, two\r\n\n  \nthree\n")
    task = task_of("masked_lm")
    rows = task.read_rows(tmp_path / "a.txt", TrainConfig(task="masked_lm"), True)
    assert [(row.text, row.line, row.pair) for row in rows] == [
        ("one, two", 1, None),
        ("three", 4, None),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"one, two",x\nthree,y\n'),
        ("a.tsv", "sentence1\tsentence2\none, two\tnot this\nthree\tnor this\n"),
        ("a.jsonl", '{"text": "one, two"}\n{"text": "three"}\n'),
    ],
)
def test_other_files_have_a_column_of_texts(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    arguments = TrainConfig(task="masked_lm")
    rows = task_of("masked_lm").read_rows(tmp_path / name, arguments, True)
    assert [(row.text, row.pair) for row in rows] == [("one, two", None), ("three", None)]


def test_a_file_of_blank_lines_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n  \n")
    with pytest.raises(MiniloraError, match="is empty: it holds no text"):
        list(
            task_of("masked_lm").read_rows(tmp_path / "a.txt", TrainConfig(task="masked_lm"), True)
        )


@pytest.mark.parametrize("name", ["text_pair_column", "label_column", "hf_parity"])
def test_what_texts_without_labels_have_no_use_for_is_refused_by_name(name):
    with pytest.raises(MiniloraError, match=f"{name} is for .*, not masked_lm"):
        TrainConfig(task="masked_lm", **{name: True if name == "hf_parity" else "a"})


@pytest.mark.parametrize("name", ["line_by_line", "mlm_probability"])
def test_its_own_settings_are_no_other_tasks(name):
    with pytest.raises(MiniloraError, match=f"{name} is for masked_lm, not regression"):
        TrainConfig(task="regression", **{name: True if name == "line_by_line" else 0.2})


def test_nothing_masked_is_nothing_to_learn():
    with pytest.raises(MiniloraError, match="mlm_probability is 0"):
        TrainConfig(task="masked_lm", mlm_probability=0.0)


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_tokens_are_masked_in_the_shares_of_the_paper(probability, tokenizer):
    """Within 4 standard deviations of each binomial."""
    task, examples = examples_of(texts_of(8000), tokenizer, mlm_probability=probability)
    found = varied(task, examples, 0)
    chosen, special = found.labels != NO_LABEL, np.isin(examples.input_ids, range(5))
    assert not chosen[special].any() and (found.labels == examples.input_ids)[chosen].all()
    assert (found.input_ids == examples.input_ids)[~chosen].all()

    def share(of, expected):
        assert abs(of.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(of))

    share(chosen[~special], probability)
    shown, true = found.input_ids[chosen], found.labels[chosen]
    words = len(tokenizer)
    share(shown == tokenizer.mask_token_id, 0.8 + 0.1 / words)
    share(shown == true, 0.1 + 0.1 / words)
    other = shown[(shown != tokenizer.mask_token_id) & (shown != true)]
    assert set(other) == set(range(words)) - {tokenizer.mask_token_id}


def test_masks_are_a_function_of_seed_and_epoch(tokenizer):
    texts = texts_of(50)
    task, examples = examples_of(texts, tokenizer)
    before = examples.input_ids.copy()
    first, again = varied(task, examples, 3), varied(task, examples, 3)
    assert (first.input_ids == again.input_ids).all() and (first.labels == again.labels).all()
    other_seed = task_of("masked_lm", seed=43)
    for other in (varied(task, examples, e) for e in (0, 2, 4, None)):
        assert (other.labels != first.labels).mean() > 0.1
    assert (varied(other_seed, examples, 3).labels != first.labels).mean() > 0.1
    assert (examples.input_ids == before).all()
    fixed = [varied(task, examples, None).labels.tolist() for _ in range(2)]
    assert fixed[0] == fixed[1]


def philox(key, place):
    """The 64-bit number of a place, by the definition (Salmon et al. 2011, Philox4x64-10)."""
    x, (k0, k1) = [place // 4 + 1, 0, 0, 0], key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [second >> 64 ^ x[1] ^ k0, second % 2**64, first >> 64 ^ x[3] ^ k1, first % 2**64]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return x[place % 4]


@pytest.mark.parametrize("epoch", [0, 3, None])
def test_what_happens_to_a_token_is_a_function_of_seed_epoch_and_place(epoch, tokenizer):
    task, examples = examples_of(texts_of(40), tokenizer, mlm_probability=0.25, seed=7)
    found, words = varied(task, examples, epoch), len(tokenizer)
    for place, (true, may) in enumerate(zip(examples.input_ids, examples.labels, strict=True)):
        number = philox((7, 2**64 - 1 if epoch is None else epoch), place)
        word, tenth = divmod(number % 2**32, 10)
        shown, label = true, NO_LABEL
        if may != NO_LABEL and number >> 32 < 0.25 * 2**32:
            replaced = word % words if tenth == 8 else true
            shown, label = (tokenizer.mask_token_id if tenth < 8 else replaced), true
        assert (found.input_ids[place], found.labels[place]) == (shown, label)


def batch_of(forward, task, examples, epoch=0):
    varied_examples = varied(task, examples, epoch)
    return forward.collate(varied_examples, np.arange(len(examples)))


@pytest.fixture(scope="module")
def model():
    set_seed(0)
    return BertForMaskedLM(tiny_config(initializer_range=0.2)).eval()


@pytest.mark.parametrize("room", [Padded, Packed])
def test_the_loss_is_transformers_of_all_tokens(room, model, tokenizer):
    task, examples = examples_of(texts_of(12), tokenizer, line_by_line=True)
    batch = batch_of(room(model, 0), task, examples)
    assert batch["masked"].shape == batch["labels"].shape == (task.loss_weight(batch),)
    padded = Padded(model, 0).collate(varied(task, examples, 0), np.arange(len(examples)))
    labels = torch.full(padded["input_ids"].shape, NO_LABEL)
    labels.view(-1)[padded["masked"]] = padded["labels"]
    inputs = {name: padded[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        logits = room(model, 0)(batch)
    assert logits.shape == (len(batch["labels"]), len(tokenizer))
    for loss in (task.loss, task.training_loss):
        torch.testing.assert_close(loss(logits, batch), expected, rtol=1e-5, atol=1e-6)


def test_a_step_without_a_masked_token_is_no_nan(model, tokenizer):
    task, examples = examples_of(["", "the"], tokenizer, line_by_line=True)
    blank = dataclasses.replace(examples, labels=np.full_like(examples.labels, NO_LABEL))
    config = TrainConfig(task="masked_lm")
    own = BertForMaskedLM(tiny_config())
    before = [parameter.detach().clone() for parameter in own.parameters()]
    for room in (Padded, Packed):
        forward = room(own, 0)
        optimizer = build_optimizer(own, config)
        training = Training(own, optimizer, build_scheduler(optimizer, config, 1), forward, task)
        batches = [forward.collate(blank, np.arange(2)), forward.collate(blank, np.arange(1))]
        losses, norm = training_step(training, config, batches)
        assert losses == [0.0, 0.0] and norm == 0.0
    for old, new in zip(before, own.parameters(), strict=True):
        assert torch.equal(old, new)


def test_of_no_masked_token_there_is_no_evaluation(tokenizer):
    task, examples = examples_of([""], tokenizer)
    varied(task, examples, 0)
    with pytest.raises(MiniloraError, match="no token was masked; give more"):
        varied(task, examples, None)


def test_perplexity_is_e_to_the_mean_loss_of_all_masked_tokens(model, tokenizer):
    task, examples = examples_of(texts_of(40), tokenizer, line_by_line=True)
    examples, forward = varied(task, examples, None), Packed(model, 0)
    batches = [forward.collate(examples, np.arange(40)[i : i + 7]) for i in range(0, 40, 7)]
    scorer = task.scorer([], examples)
    found = evaluate_model(forward, task, False, iter(batches), scorer, "eval")
    with torch.no_grad():
        logits = torch.cat([forward(batch) for batch in batches]).double()
    labels = torch.cat([batch["labels"] for batch in batches])
    mean = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["eval_loss"] == pytest.approx(mean, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)
    right = (logits.argmax(-1) == labels).double().mean().item()
    assert found["eval_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("text", "max_length"), [("the film", 16), ("", 16), ("the film was [MASK]", 4)]
)
def test_a_text_without_a_mask_to_fill_is_an_error_with_its_line(text, max_length, tokenizer):
    texts = ["a [MASK]", text, "the [MASK] was [MASK]"][: 2 if max_length == 4 else 3]
    with pytest.raises(MiniloraError, match=r"^f, line 2: each text needs a \[MASK\], and none"):
        examples_of(texts, tokenizer, max_length, label=None)


def test_masks_are_filled_where_they_stand(tokenizer):
    texts = ["[MASK] film was [MASK]!", "a [MASK]"]
    task, examples = examples_of(texts, tokenizer, label=None)
    logits = np.zeros((3, len(tokenizer)), dtype=np.float32)
    ids = tokenizer.convert_tokens_to_ids(["the", "good", "book"])
    logits[range(3), ids] = 5
    kept = task.condense(logits, tokenizer)
    rows = [Row(text, None, None, None, 1) for text in texts]
    first, second = task.predictions(rows, examples, [kept[:2], kept[2:]])
    assert first["text"] == "the film was good!" and second["text"] == "a book"
    assert [(fill["token"], texts[0][fill["start"] : fill["end"]]) for fill in first["fills"]] == [
        ("the", "[MASK]"),
        ("good", "[MASK]"),
    ]
    best, *others = second["fills"][0]["candidates"]
    expected = np.exp(5) / (np.exp(5) + len(tokenizer) - 1)
    assert best["score"] == second["fills"][0]["score"] == pytest.approx(expected)
    assert len(others) == 4 and all(one["score"] < best["score"] for one in others)


def test_the_example_corpus_is_sixty_different_lines():
    lines = CORPUS.read_text().splitlines()
    assert len(set(lines)) == len(lines) == 60 and min(map(len, lines)) > 30
