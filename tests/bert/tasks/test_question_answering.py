"""Answers in passages: files, windows, what they cost, which are found, how they are scored."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, BertForQuestionAnswering, set_seed

from minilora import MiniloraError, TrainConfig
from minilora.bert.dataset import collate_padded, tokenize
from minilora.bert.packing import collate_packed
from minilora.bert.rows import Row
from minilora.bert.tasks import task_class
from minilora.bert.tasks.question_answering import ANSWER, ANSWER_OR_NONE, N_BEST, best_spans
from tests.conftest import WORDS, task_of, tiny_config

NAME = "question_answering"
CLASS = task_class(NAME)


def question(draw, number, words):
    """One in three has no answer."""
    passage = draw.choices(WORDS, k=draw.randint(1, words))
    first = draw.randrange(len(passage))
    answer = passage[first : first + draw.randint(1, 3)]
    start = len(" ".join([*passage[:first], ""]))
    found = [{"text": " ".join(answer), "answer_start": start}] if number % 3 else []
    asked = " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
    return {"id": f"q{number}", "question": asked, "context": " ".join(passage), "answers": found}


def squad(path, questions):
    paragraphs = [{"context": each["context"], "qas": [each]} for each in questions]
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return path


def read(path, labelled=True, **arguments):
    return list(CLASS.read_rows(path, TrainConfig(task=NAME, **arguments), labelled))


@pytest.fixture
def rows(tmp_path):
    draw = random.Random(3)
    return read(squad(tmp_path / "questions.json", [question(draw, n, 80) for n in range(30)]))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


# Files.


def test_squad_the_hub_and_flat_objects_are_the_same_rows(tmp_path):
    of_squad = {"text": "plot", "answer_start": 4}
    row = {"id": "7", "question": "what", "context": "the plot"}
    none = {**row, "id": "8", "is_impossible": True, "plausible_answers": [of_squad]}
    forms = [
        [{**row, "answers": [of_squad]}, {**none, "answers": []}],
        [{**row, "answers": {"text": ["plot"], "answer_start": [4]}},
         {**none, "answers": {"text": [], "answer_start": []}}],
        [{**row, "answer": "plot", "answer_start": 4}, {**none, "answer": None}],
    ]  # fmt: skip
    array, lines = tmp_path / "f.json", tmp_path / "f.jsonl"
    found = [read(squad(tmp_path / "squad.json", forms[0]))]
    for form in forms:
        array.write_text(json.dumps(form))
        lines.write_text("\n".join(map(json.dumps, form)))
        found += [read(array), read(lines)]
    assert all(rows == found[0] for rows in found)
    first, second = found[0]
    assert (first.text, first.pair, first.label) == ("what", "the plot", [(4, "plot")])
    assert (second.label, second.line, second.fields) == ([], 2, {"id": "8"})


def test_of_what_is_to_be_predicted_no_answers_are_looked_at(tmp_path):
    lines = tmp_path / "f.jsonl"
    lines.write_text('{"q": "what", "p": "the plot", "answers": 7}')
    (row,) = read(lines, False, text_column="q", text_pair_column="p")
    assert (row.text, row.pair, row.label) == ("what", "the plot", None)


GOOD = {"id": "x1", "question": "what", "context": "the plot"}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({**GOOD, "answers": [{"text": "plot", "answer_start": 3}]},
         "the answer 'plot' of the question 'x1' is not at 3 in its passage"),
        ({**GOOD, "answers": [{"text": "plot", "answer_start": -4}]}, "not at -4"),
        ({**GOOD, "answers": [{"text": "plot", "answer_start": "4"}]}, "not at '4'"),
        ({**GOOD, "answers": [{"text": "plot"}]}, "not at None"),
        ({**GOOD, "answers": [{"text": "", "answer_start": 0}]}, "the answer ''"),
        ({**GOOD, "answers": {"text": ["plot"], "answer_start": []}}, "'answers' is no list of"),
        ({**GOOD, "answers": ["plot"]}, "'answers' is no list of"),
        ({**GOOD, "answers": {"text": 1, "answer_start": 2}}, "'answers' is no list of"),
        (GOOD, "'answers' is no list of"),
        ({**GOOD, "answer": "plot"}, "'answers' is no list of"),
        ({**GOOD, "answers": [{"text": "plot", "answer_start": 4}], "is_impossible": True},
         "is_impossible is true of the question 'x1', which has an answer"),
        ({**GOOD, "context": " "}, "the question or the context is empty"),
        ({**GOOD, "question": ""}, "the question or the context is empty"),
        ({"id": "x1", "question": "what"}, "no pair \\(column 'context'\\)"),
        ({"context": "the plot"}, "no text \\(column 'question'\\)"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_with_their_line(record, complaint, tmp_path):
    fine = {**GOOD, "answers": []}
    lines = tmp_path / "f.jsonl"
    lines.write_text(json.dumps(fine) + "\n\n" + json.dumps(record))
    with pytest.raises(MiniloraError, match=f"f.jsonl, line 3: .*{complaint}"):
        read(lines)


@pytest.mark.parametrize(
    "layout",
    [{}, {"data": 1}, {"data": [1]}, {"data": [{"paragraphs": [{"qas": [{}]}]}]},
     {"data": [{"paragraphs": [{"context": "a", "qas": [1]}]}]}, {"data": {"paragraphs": []}}],
    ids=str,
)  # fmt: skip
def test_what_is_not_built_as_squad_is_refused(layout, tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps(layout))
    with pytest.raises(MiniloraError, match="f.json is not built as SQuAD"):
        read(path)


def test_a_file_without_questions_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(MiniloraError, match="is empty"):
        read(squad(tmp_path / "f.json", []))
    with pytest.raises(MiniloraError, match="suffix '.csv'; allowed are .json, .jsonl"):
        read(tmp_path / "f.csv")


def test_whether_there_may_be_no_answer_is_what_the_training_rows_say(rows):
    answered = [row for row in rows if row.label]
    assert CLASS.find_labels(rows, "f") == ANSWER_OR_NONE
    assert CLASS.find_labels(answered, "f") == ANSWER
    with pytest.raises(MiniloraError, match="no question with an answer"):
        CLASS.find_labels([row for row in rows if not row.label], "f")


# Windows.


@pytest.mark.parametrize(("max_length", "stride"), [(24, 5), (32, 0), (40, 12), (64, 128)])
def test_windows_are_those_of_transformers_stride(max_length, stride, rows, tokenizer):
    arrays = task_of(NAME, doc_stride=stride).encode(rows, tokenizer, max_length, "f")
    edges, index = np.cumsum(arrays["lengths"])[:-1], 0
    ids, spans, types = (
        np.split(arrays[name], edges) for name in ("input_ids", "spans", "token_type_ids")
    )
    for number, row in enumerate(rows):
        room = max_length - 3 - len(tokenizer.tokenize(row.text))
        theirs = tokenizer(
            row.text, row.pair, truncation="only_second", max_length=max_length,
            stride=min(stride, room // 2), return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )  # fmt: skip
        for window, expected in enumerate(theirs["input_ids"]):
            assert ids[index].tolist() == expected and arrays["row"][index] == number
            assert types[index].tolist() == theirs["token_type_ids"][window]
            of_passage = np.array(theirs.sequence_ids(window)) == 1
            offsets = np.array(theirs["offset_mapping"][window])[of_passage]
            assert (spans[index][of_passage] == offsets).all()
            assert (spans[index][~of_passage] == -1).all()
            index += 1
    assert index == len(ids) > len(rows) and not arrays["truncated"].any()


def test_labels_are_the_answers_tokens_or_the_first_where_a_window_lacks_it(rows, tokenizer):
    arrays = task_of(NAME, doc_stride=5).encode(rows, tokenizer, 24, "f")
    spans, seen = np.split(arrays["spans"], np.cumsum(arrays["lengths"])[:-1]), set()
    for places, owner, (start, end) in zip(spans, arrays["row"], arrays["labels"], strict=True):
        row, of_passage = rows[owner], places[places[:, 0] >= 0]
        if (start, end) != (0, 0):
            ((first, text),) = row.label
            assert row.pair[places[start, 0] : places[end, 1]] == text
            assert places[start, 0] == first
            seen.add(owner)
        elif row.label:
            ((first, text),) = row.label
            assert of_passage[0, 0] > first or of_passage[-1, 1] < first + len(text)
    assert seen == {owner for owner, row in enumerate(rows) if row.label}


@pytest.mark.parametrize(
    ("offsets", "answer", "expected"),
    [
        ([(0, 1), (0, 1), (0, 1), (1, 2)], (0, "국"), (1, 3)),  # a syllable cut into its letters
        ([(0, 3), (4, 5), (4, 5), (6, 8)], (4, "😀"), (2, 3)),  # bytes
        ([(0, 3), (4, 8)], (4, "cafe\u0301"), (2, 2)),  # an accent that is stripped, at the end
        ([(0, 3), (4, 8), (9, 10)], (4, "cafe\u0301"), (2, 2)),  # and before a full stop
        ([(0, 3), (4, 8)], (3, " plot \n"), (2, 2)),  # spaces, in no token
        ([(0, 3), (4, 8)], (1, "h"), (1, 1)),  # part of a token
        ([(0, 3), (6, 8)], (4, "\u200b"), (0, 0)),  # what no token has
    ],
)
def test_an_answer_s_tokens_are_all_that_hold_any_of_it(offsets, answer, expected, monkeypatch):
    passage = " " * answer[0] + answer[1] + " " * 9
    row = Row("q", passage, [answer], None, 1)
    sequences = [None, *(1 for _ in offsets), None]
    offsets = [(0, 0), *offsets, (0, 0)]
    ids, types = list(range(len(offsets))), [0] * len(offsets)
    made = SimpleNamespace(offsets=offsets, sequence_ids=sequences, ids=ids, type_ids=types)
    room = "minilora.bert.tasks.question_answering"
    monkeypatch.setattr(f"{room}.whole_encodings", lambda *_: [made])
    names = SimpleNamespace(model_input_names=[])
    assert tuple(task_of(NAME).encode([row], names, 9, "f")["labels"][0]) == expected


def test_a_question_that_leaves_no_room_is_refused_with_its_line(rows, tokenizer):
    long = [rows[0], rows[1].__class__("plot " * 30, "the plot", [], None, 9)]
    with pytest.raises(MiniloraError, match="f, line 9: the question has 33 tokens .* none are"):
        task_of(NAME).encode(long, tokenizer, 33, "f")
    assert len(task_of(NAME).encode(long, tokenizer, 34, "f")["lengths"]) > 2  # one token each


def test_a_slow_tokenizer_is_refused_by_name(rows):
    class BertTokenizerSlow:
        is_fast = False

    with pytest.raises(MiniloraError, match="BertTokenizerSlow does not tell .* a fast tokenizer"):
        task_of(NAME).encode(rows, BertTokenizerSlow(), 64, "f")


def test_a_space_that_a_tokenizer_counts_to_a_word_is_no_part_of_an_answer():
    from minilora.bert.texts import token_spans

    offsets, sequences = [(0, 3), (0, 3), (3, 8), (0, 0)], [0, 1, 1, None]
    encoding = SimpleNamespace(offsets=offsets, sequence_ids=sequences)
    spans = token_spans(encoding, "the plot", 1)
    assert spans.tolist() == [[-1, -1], [0, 3], [4, 8], [-1, -1]]


# What they cost.


@pytest.fixture
def batches(rows, tokenizer):
    """(padded, packed) batches of the same windows, and logits of each, the same of each token."""
    examples = tokenize(rows, task_of(NAME, doc_stride=5), tokenizer, 40, "f", keep=False)
    indices = np.array([4, 0, 9, 17, 2])
    padded = collate_padded(examples, indices, 0)
    packed = collate_packed(examples, indices, 0, 8)
    logits = torch.randn(*padded["input_ids"].shape, 2, generator=torch.manual_seed(0))
    apart = [logits[place, : packed["lengths"][at]] for place, at in enumerate(packed["place"])]
    row = torch.cat([apart[place] for place in packed["place"].argsort()])
    filler = torch.randn(len(packed["input_ids"]) - len(row), 2)
    return padded, packed, logits.requires_grad_(), torch.cat([row, filler]).requires_grad_()


@pytest.mark.parametrize("hf_parity", [False, True])
def test_padding_on_the_left_costs_what_it_costs_on_the_right(hf_parity, rows, tokenizer):
    task = task_of(NAME, doc_stride=5, hf_parity=hf_parity)
    examples = tokenize(rows, task, tokenizer, 40, "f", keep=False)
    right, left = (collate_padded(examples, np.arange(17), 0, side) for side in ("right", "left"))
    logits = torch.randn(*right["input_ids"].shape, 2, generator=torch.manual_seed(0))
    moved = torch.empty_like(logits)
    for one, other in ((1, 1), (0, 0)):
        moved[left["attention_mask"] == one] = logits[right["attention_mask"] == other]
    assert right["labels"].any() and not torch.equal(left["input_ids"], right["input_ids"])
    torch.testing.assert_close(task.loss(moved, left), task.loss(logits, right))


def test_packed_costs_what_padded_costs_and_padding_nothing(batches):
    padded, packed, logits, row = batches
    task = task_of(NAME)
    costs = task.loss(logits, padded), task.training_loss(row, packed)
    torch.testing.assert_close(*costs)
    for cost in costs:
        cost.backward()
    assert logits.grad is not None and row.grad is not None
    assert (logits.grad[padded["attention_mask"] == 0] == 0).all()
    assert row.grad.isfinite().all() and (row.grad[packed["lengths"].sum() :] == 0).all()
    torch.testing.assert_close(logits.grad.abs().sum(), row.grad.abs().sum())
    assert task.loss_weight(padded) == task.loss_weight(packed) == 5


def test_with_hf_parity_the_loss_is_bitwise_transformers(batches):
    padded, *_ = batches
    set_seed(0)
    model, labels = BertForQuestionAnswering(tiny_config()).eval(), padded["labels"]
    inputs = {name: padded[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    theirs = model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1])
    logits = torch.stack([theirs.start_logits, theirs.end_logits], dim=-1)
    assert torch.equal(task_of(NAME, hf_parity=True).loss(logits, padded), theirs.loss)
    # A negative control: padding is a place for an answer there, and here it is not.
    assert not torch.isclose(task_of(NAME).loss(logits, padded), theirs.loss)


# Which are found.


def brute_force(logits, spans):
    found = []
    for first in range(len(spans)):
        for last in range(first, min(first + 30, len(spans))):
            if spans[first, 0] >= 0 and spans[last, 0] >= 0:
                score = float(logits[first, 0]) + float(logits[last, 1])
                found.append((score, int(spans[first, 0]), int(spans[last, 1])))
    return sorted(found, reverse=True)[:N_BEST]


@pytest.mark.parametrize("length", [0, 1, 3, 29, 30, 31, 60])
def test_the_best_spans_are_those_of_all_that_are_short_enough(length):
    places = 5 * np.arange(length)[:, None] + [[0, 4]]
    spans = np.concatenate([np.full((4, 2), -1), places, [[-1, -1]]]).astype(np.int32)
    logits = np.random.default_rng(length).normal(size=(len(spans), 2)).astype(np.float32)
    none, *found = best_spans(logits, spans)
    assert found == brute_force(logits, spans)
    assert none == (pytest.approx(logits[0].sum()), 0, 0)


def asked(task, passages, windows):
    """The predictions of a task, given the best spans of each window of each passage."""
    rows = [SimpleNamespace(pair=passage, fields={}) for passage in passages]
    owners = np.repeat(np.arange(len(rows)), [len(each) for each in windows])
    flat = [window for each in windows for window in each]
    return list(task.answers(rows, SimpleNamespace(row=owners), flat))


def test_the_same_words_of_two_windows_are_one_answer_with_the_higher_score():
    windows = [[[(9.0, 0, 0), (1.0, 0, 3)], [(8.0, 0, 0), (2.0, 0, 3), (1.5, 4, 8)]],
               [[(0.0, 0, 0), (0.5, 4, 8)]]]  # fmt: skip
    found = asked(task_of(NAME, ANSWER), ["the plot"] * 2, windows)
    assert found == [[(2.0, 0, 3), (1.5, 4, 8)], [(0.5, 4, 8)]]


@pytest.mark.parametrize(
    ("nulls", "best"),
    [((9.0, 8.0), (8.0, 0, 0)), ((9.0, 1.9), (2.0, 0, 3)), ((2.0, 2.0), (2.0, 0, 3))],
)
def test_there_is_no_answer_where_every_window_says_so(nulls, best):
    windows = [[[(nulls[0], 0, 0), (1.0, 0, 3)], [(nulls[1], 0, 0), (2.0, 0, 3)]]]
    (found,) = asked(task_of(NAME, ANSWER_OR_NONE), ["the plot"], windows)
    assert found[0] == best and len(found) == 2
    (found,) = asked(task_of(NAME, ANSWER), ["the plot"], windows)
    assert found == [(2.0, 0, 3)]


def test_predictions_say_the_words_their_places_and_shares(rows, tokenizer):
    task = task_of(NAME, ANSWER_OR_NONE, doc_stride=5)
    examples = tokenize(rows, task, tokenizer, 24, "f", keep=False)
    draw = np.random.default_rng(0)
    lengths = np.diff(examples.offsets)
    logits = [draw.normal(size=(length, 2)).astype(np.float32) for length in lengths]
    found = task.predictions(rows, examples, logits)
    assert len(found) == len(rows) < len(examples)
    for row, prediction in zip(rows, found, strict=True):
        assert list(prediction) == ["id", "answer", "score", "start", "end", "answers"]
        assert prediction["id"] == row.fields["id"]
        assert prediction["answers"][0].items() <= prediction.items()
        assert sum(answer["score"] for answer in prediction["answers"]) == pytest.approx(1)
        scores = [answer["score"] for answer in prediction["answers"]]
        assert scores == sorted(scores, reverse=True)
        for answer in prediction["answers"]:
            assert row.pair[answer["start"] : answer["end"]] == answer["answer"]
        assert len({(each["start"], each["end"]) for each in prediction["answers"]}) == len(scores)


@pytest.mark.parametrize("packed", [False, True])
def test_right_logits_score_one_and_each_kind_for_itself(packed, rows, tokenizer):
    task = task_of(NAME, ANSWER_OR_NONE, doc_stride=5)
    examples = tokenize(rows, task, tokenizer, 40, "f", keep=False)
    scorer = task.scorer(rows, examples)
    for indices in np.array_split(np.arange(len(examples)), 4):
        padded = collate_padded(examples, indices, 0)
        right = torch.zeros(*padded["input_ids"].shape, 2)
        for place, (start, end) in enumerate(padded["labels"]):
            right[place, start, 0] = right[place, end, 1] = 9.0
        batch, logits = padded, right
        if packed:
            batch = collate_packed(examples, indices, 0, 8)
            order = batch["place"].argsort()
            apart = [right[place][padded["attention_mask"][place] == 1] for place in order]
            logits = torch.cat([*apart, torch.zeros(8, 2)])[: len(batch["input_ids"])]
        scorer.add(logits, batch)
    found = scorer.metrics()
    assert list(found) == [
        "exact_match",
        "f1",
        "HasAns_exact",
        "HasAns_f1",
        "NoAns_exact",
        "NoAns_f1",
    ]
    assert set(found.values()) == {1.0}
    scorer.rows = [row for row in rows if row.label]
    scorer.examples = tokenize(scorer.rows, task, tokenizer, 40, "f", keep=False)
    scorer.best = [[(9.0, 0, 0)]] * len(scorer.examples)
    assert scorer.metrics() == {"exact_match": 0.0, "f1": 0.0}


def test_transformers_has_no_pipeline_for_this_any_more():
    """Once it is back, a merged model is to be tried in it."""
    assert "question-answering" not in transformers.pipelines.get_supported_tasks()
