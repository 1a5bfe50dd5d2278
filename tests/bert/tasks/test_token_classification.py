"""Tags: how files are read, which sub-token carries one, what is scored, what is said of a text."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForTokenClassification, set_seed

from minilora import MiniloraError, TrainConfig
from minilora.bert.dataset import collate_padded, tokenize
from minilora.bert.packing import collate_packed
from minilora.bert.rows import Row
from tests.conftest import task_of, tiny_config

LABELS = ["B-x", "I-x", "O"]
TASK = task_of("token_classification", LABELS)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def read(tmp_path):
    def read(name, text, labelled=True, **given):
        (tmp_path / name).write_text(text)
        config = TrainConfig(task=TASK.name, **given)
        return list(TASK.read_rows(tmp_path / name, config, labelled))

    return read


def row_of(tokens, tags=None, line=1):
    return Row(" ".join(tokens), None, tags, None, line, {"tokens": tokens})


GOOD = [(1, ["so", "long"], ["O", "B-x"]), (4, ["fine"], ["O"])]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.conll", "so\tO\nlong\tB-x\n\nfine\tO\n"),
        ("a.txt", "so NN _ O\nlong JJ _ B-x\n \nfine JJ _ O"),
        ("a.conll", "so\tO\r\nlong\tB-x\r\n\ufeff\r\nfine\tO\r\n\r\n"),
    ],
)
def test_columns_are_token_first_and_tag_last(name, text, read):
    assert [(r.line, r.fields["tokens"], r.label) for r in read(name, text)] == GOOD


@pytest.mark.parametrize("between", [" ", "\t", "  NN "])
@pytest.mark.parametrize("token", ["10\xa0000", "\u2028so", "so\x85", "\u3000"])
def test_a_token_is_all_that_stands_between_spaces_or_tabs(token, between, read):
    """Python's own split knows more white space, and would leave a part of the token."""
    [row] = read("a.conll", f"{token}{between}O\r\nfine{between}O\r\n")
    assert (row.fields["tokens"], row.label) == ([token, "fine"], ["O", "O"])


def test_objects_have_tokens_and_tags_under_these_names_or_the_given(read):
    rows = read("a.jsonl", '{"tokens": ["so", "a b"], "tags": ["O", "B-x"]}\n')
    assert rows == [row_of(["so", "a b"], ["O", "B-x"])]
    rows = read("a.json", '[{"w": ["so"], "t": ["O"]}]', text_column="w", label_column="t")
    assert rows == [row_of(["so"], ["O"])]


def test_a_documents_first_line_is_no_token(read):
    rows = read("a.conll", "-DOCSTART- -X- -X- O\n\nso O\n-DOCSTART- O\nfine O\n")
    assert [(row.line, row.text) for row in rows] == [(3, "so"), (5, "fine")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.conll", "so\tO\nlong\n", r"a.conll, line 2: 'long' is one field"),
        ("a.conll", "so\tO\n\n\tO\n", r"a.conll, line 3: token 1 is empty"),
        ("a.conll", "so\tO\n\nx\tB-\n", r"a.conll, line 3: the tag 'B-' of token 1 is unfinished"),
        ("a.conll", "so\tO\n\nx\tO\ny\tB-\n", "line 4: the tag 'B-' of token 2 is unfinished"),
        ("a.bio", "so\tO\nx\tO\n\tO\n", "line 3: token 3 is empty"),
        (
            "a.jsonl",
            '{"tokens": ["a", "b"], "tags": ["O", "B-"]}',
            "line 1: the tag 'B-' of token 2",
        ),
        ("a.conll", "\n\n", "a.conll is empty"),
        ("a.csv", "so,O\n", "suffix '.csv'; allowed are .conll"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', "line 1: 2 tokens and 1 tags"),
        ("a.jsonl", '{"tokens": [], "tags": []}', "line 1: the sentence has no token"),
        ("a.jsonl", '\n{"tokens": ["a"]}', "line 2: 'tags' is None; it must be a list of strings"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [0]}', "must be a list of strings"),
        ("a.jsonl", '{"tokens": "a", "tags": ["O"]}', "must be a list of strings"),
        ("a.json", "[]", "a.json is empty"),
        ("a.jsonl", '{"tokens": ["\\ud800"], "tags": ["O"]}', "half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(name, text, message, read):
    with pytest.raises(MiniloraError, match=message):
        read(name, text)


def test_files_without_tags_hold_tokens_or_texts(read):
    assert read("a.conll", "so\nlong\n\nfine\n", False) == [
        row_of(["so", "long"]), row_of(["fine"], line=4)
    ]  # fmt: skip
    assert read("a.jsonl", '{"tokens": ["so"]}\n', False) == [row_of(["so"])]
    assert read("a.jsonl", '{"text": "so long"}\n', False) == [Row("so long", None, None, None, 1)]
    assert read("a.csv", "text\nso long\n", False) == [Row("so long", None, None, None, 2)]


def test_texts_are_not_taken_for_columns(read):
    with pytest.raises(MiniloraError, match="a.txt, line 2: 3 fields where the first line has 2"):
        read("a.txt", "so long\nand thanks again\n", False)


def test_a_file_that_holds_both_tokens_and_texts_is_refused(read):
    with pytest.raises(MiniloraError, match="line 2: 'tokens' is None"):
        read("a.jsonl", '{"tokens": ["so"]}\n{"text": "so long"}\n', False)


def test_labels_are_the_sorted_tags_and_one_is_nothing_to_learn():
    rows = [row_of(["a", "b"], ["O", "I-x"]), row_of(["c"], ["B-x"])]
    assert TASK.find_labels(rows, "f") == LABELS
    with pytest.raises(MiniloraError, match="f has a single tag, 'O'"):
        TASK.find_labels([row_of(["a"], ["O"])], "f")


def test_a_tag_that_training_does_not_know_is_refused_with_its_place(tokenizer):
    rows = [row_of(["a"], ["O"]), row_of(["a", "film"], ["O", "B-y"], line=7)]
    with pytest.raises(MiniloraError, match="f, line 7: token 2, 'film', has the tag 'B-y', .*B-x"):
        TASK.encode(rows, tokenizer, 8, "f")
    with pytest.raises(MiniloraError, match="f.conll, line 8: token 2, 'film', has the tag 'B-y'"):
        TASK.encode(rows, tokenizer, 8, "f.conll")


@pytest.mark.parametrize("all_tokens", [False, True])
def test_sub_tokens_are_labelled_as_transformers_run_ner_labels_them(all_tokens, tokenizer):
    """The words' sub-tokens by `word_ids`; where all are labelled, only the first begins."""
    tokenizer.add_tokens(["so-", "-so"])
    rows = [
        row_of(["so-so", "film", "a"], ["B-x", "I-x", "O"]),
        row_of(["the", "the-film", "the"], ["O", "I-x", "O"]),
        row_of(["a"] * 20, ["O"] * 19 + ["B-x"]),
    ]
    task = task_of("token_classification", LABELS, label_all_tokens=all_tokens)
    found = tokenize(rows, task, tokenizer, 12, "f")
    inside = {0: 1, 1: 1, 2: 2}
    for index, row in enumerate(rows):
        encoded = tokenizer(
            row.fields["tokens"], is_split_into_words=True, truncation=True, max_length=12
        )
        expected, before = [], None
        for word in encoded.word_ids():
            label = -100 if word is None else LABELS.index(row.label[word])
            rest = inside.get(label, -100) if all_tokens else -100
            expected.append(rest if word == before else label)
            before = word
        part = slice(*found.offsets[index : index + 2])
        assert found.input_ids[part].tolist() == encoded["input_ids"]
        assert found.labels[part].tolist() == expected
    assert found.truncated == 1


def test_a_slow_tokenizer_is_refused_by_name(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(MiniloraError, match="does not tell where .* needs a fast tokenizer"):
        TASK.encode([row_of(["a"], ["O"])], tokenizer, 8, "f")


def test_the_loss_is_bitwise_transformers_and_smoothed_as_trainer_does():
    from transformers.trainer_pt_utils import LabelSmoother

    set_seed(0)
    model = BertForTokenClassification(tiny_config(num_labels=3)).eval()
    labels = torch.tensor([[0, -100, 2, 1], [-100, -100, 2, -100]])
    expected = model(input_ids=torch.arange(1, 9).reshape(2, 4), labels=labels)
    batch = {"labels": labels}
    assert torch.equal(TASK.loss(expected.logits, batch), expected.loss)
    assert torch.equal(TASK.training_loss(expected.logits, batch), expected.loss)
    assert TASK.loss_weight(batch) == 4
    smoothed = task_of("token_classification", LABELS, label_smoothing_factor=0.1)
    theirs = LabelSmoother(epsilon=0.1)({"logits": expected.logits}, labels)
    assert torch.equal(smoothed.training_loss(expected.logits, batch), theirs)


def test_a_batch_without_a_label_costs_nothing():
    logits, labels = torch.randn(2, 3, 3, requires_grad=True), torch.full((2, 3), -100)
    for loss in (TASK.loss, TASK.training_loss):
        loss(logits, {"labels": labels}).backward()
    assert logits.grad is not None and not logits.grad.any()


def collated(examples, indices, packed):
    return (collate_packed if packed else collate_padded)(examples, indices, 0, *[4] * packed)


def scored(rows, tokenizer, length=12, packed=False):
    examples = tokenize(rows, TASK, tokenizer, length, "f")
    scorer, tags = TASK.scorer(rows, examples), {}
    draw = torch.Generator().manual_seed(1)
    for indices in np.array_split(np.arange(len(rows))[::-1].copy(), 2):
        batch = collated(examples, indices, packed)
        logits = torch.randn(*batch["labels"].shape, 3, generator=draw)
        scorer.add(logits, batch)
        starts = batch["lengths"].cumsum(0) - batch["lengths"] if packed else torch.zeros(0)
        for place, index in enumerate(indices):
            own = logits[starts[batch["place"][place]] :] if packed else logits[place]
            count = min(len(rows[index].label), length - 2)  # [CLS] word word ... [SEP]
            found = [LABELS[best] for best in own[1 : count + 1].argmax(-1)]
            tags[index] = found + ["O"] * (len(rows[index].label) - count)
    return scorer, [tags[index] for index in range(len(rows))]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_scores_of_batches_as_they_come_are_seqevals_of_the_whole(packed, tokenizer):
    """Words that were cut off count as O."""
    from seqeval import metrics

    draw = np.random.default_rng(0)
    rows = []
    for count in (3, 9, 1, 14, 6, 30):
        rows.append(row_of(["film"] * count, draw.choice(LABELS, count).tolist()))
    scorer, predicted = scored(rows, tokenizer, packed=packed)
    actual, found = [row.label for row in rows], scorer.metrics()
    for name in ("precision", "recall", "f1", "accuracy"):
        expected = getattr(metrics, f"{name}_score")(actual, predicted)
        assert found[name] == pytest.approx(expected, abs=1e-12), name
    report = metrics.classification_report(actual, predicted, output_dict=True)["x"]
    own = scorer.by_class()["x"]
    assert own["f1"] == pytest.approx(report["f1-score"]) and own["support"] == report["support"]


def predicted(rows, tokenizer, tags_of_tokens):
    examples = tokenize(rows, TASK, tokenizer, 30, "f", keep=False)
    logits = [10 * np.eye(3, dtype=np.float32)[tags] for tags in tags_of_tokens]
    return TASK.predictions(rows, examples, logits)


def test_entities_have_their_places_in_the_text(tokenizer):
    (found,) = predicted([Row("  the film, so long", None, None, None, 1)], tokenizer,
                         [[2, 2, 0, 1, 0, 1, 2]])  # fmt: skip
    shown = [(e["start"], e["end"], e["text"], e["label"]) for e in found["entities"]]
    assert shown == [(6, 11, "film,", "x"), (12, 19, "so long", "x")]
    assert found["entities"][0]["score"] == pytest.approx(1, abs=1e-3) and "tags" not in found


def test_of_tokens_the_tags_are_said_too(tokenizer):
    (found,) = predicted([row_of(["the", "film"])], tokenizer, [[2, 2, 0, 2]])
    assert found["tags"] == ["O", "B-x"] and found["tokens"] == ["the", "film"]
    assert [entity["text"] for entity in found["entities"]] == ["film"]
    assert json.loads(json.dumps(found)) == found


def test_a_text_of_nothing_has_no_entity(tokenizer):
    assert predicted([Row("", None, None, None, 1)], tokenizer, [[2, 2]]) == [{"entities": []}]
