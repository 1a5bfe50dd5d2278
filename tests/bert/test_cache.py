"""Arrays kept between runs are the arrays that tokenising would give, or they are not used."""

import dataclasses

import numpy as np
import pytest
from transformers import AutoTokenizer

from minilora import MiniloraError
from minilora.bert.dataset import tokenize
from minilora.bert.examples import Examples
from minilora.bert.rows import Row
from tests.conftest import task_of


def rows_of(*texts, label="a"):
    return [Row(text, None, label, None, line) for line, text in enumerate(texts, start=1)]


ROWS = rows_of("the film was good", "so dull and bad and long and long")


@pytest.fixture
def load(tiny_model):
    return lambda: AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """How often texts were tokenised; the cache is empty at first, and lies in tmp_path."""
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("sequence_classification", "regression"):
        kind = type(task_of(name, ["a", "b"]))
        encode = kind.encode
        monkeypatch.setattr(
            kind, "encode", lambda *given, encode=encode: made.append(1) or encode(*given)
        )
    return made


def tokens(
    tokenizer, rows=ROWS, max_length=8, labels=("a", "b"), task="sequence_classification", keep=True
):
    return tokenize(rows, task_of(task, list(labels)), tokenizer, max_length, "f", keep)


def assert_same(one: Examples, other: Examples):
    for field in dataclasses.fields(Examples):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        assert np.array_equal(ours, theirs) and type(ours) is type(theirs), field.name
        assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None), field.name


def test_the_second_time_every_array_comes_from_the_cache(load, calls):
    first = tokens(load())
    assert_same(tokens(load()), first)
    assert len(calls) == 1 and first.truncated == 1


def test_a_tokenizer_that_was_used_before_finds_its_entries(load, calls):
    """A call leaves its truncation and padding in the tokenizer's state."""
    used = load()
    used(["the film"], truncation=True, max_length=5, padding="max_length")
    first = tokens(used)
    used(["the film"])
    assert_same(tokens(load()), first)
    assert len(calls) == 1


def test_whatever_the_arrays_depend_on_is_part_of_the_key(load, calls):
    tokens(load())
    tokens(load(), rows_of("the film was good", "so dull"))
    tokens(load(), [dataclasses.replace(ROWS[0], label="b"), ROWS[1]])
    tokens(load(), max_length=9)
    tokens(load(), labels=("0", "a", "b"))
    tokens(load(), rows_of("the film", label="1"), labels=("1", "2"))
    tokens(load(), rows_of("the film", label="1"), labels=("1", "2"), task="regression")
    other = load()
    other.add_tokens(["goodish"])
    tokens(other)
    other = load()
    other.truncation_side = "left"
    tokens(other)
    assert len(calls) == 9


def test_texts_that_only_join_to_the_same_are_told_apart(load, calls):
    tokens(load(), [Row("a b", "c", "a", None, 1), Row("d", "e", "a", None, 2)])
    tokens(load(), [Row("a", "b c", "a", None, 1), Row("d", "e", "a", None, 2)])
    assert len(calls) == 2


def test_an_unknown_label_is_refused_whatever_is_kept(load, calls):
    tokens(load())
    with pytest.raises(MiniloraError, match="line 1: label 'a' does not occur"):
        tokens(load(), labels=("b", "c"))


def test_rows_that_are_to_be_predicted_leave_nothing_behind(load, calls, tmp_path):
    for _ in range(2):
        tokens(load(), rows_of("the film", label=None), keep=False)
    assert len(calls) == 2 and not list(tmp_path.iterdir())


def test_a_slow_tokenizer_is_left_alone(load, calls, tmp_path, monkeypatch):
    """Its state is Python code."""
    tokenizer = load()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    for _ in range(2):
        tokens(tokenizer)
    assert len(calls) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "another"])
def test_a_damaged_entry_is_tokenised_anew_and_replaced(damage, load, calls, tmp_path):
    expected = tokens(load())
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes(
        {"flip": flipped, "truncate": whole[:-9], "empty": b"", "another": b"{}"}[damage]
    )
    assert_same(tokens(load()), expected)
    assert len(calls) == 2 and path.read_bytes() == whole


def test_every_flipped_byte_of_an_entry_is_noticed(load, calls, tmp_path):
    tokens(load())
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")  # past the header, in the arrays
    for position in range(start, len(whole)):
        made = len(calls)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        tokens(load())
        assert len(calls) == made + 1, position


def test_a_cache_that_cannot_be_written_is_no_error(load, calls, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(tokens(load())) == 2


def test_whether_special_tokens_in_a_text_are_split_is_part_of_the_key(load, calls):
    texts = rows_of("the [MASK] film", "good")
    whole = tokens(load(), texts)
    other = load()
    other.split_special_tokens = True
    assert len(tokens(other, texts).input_ids) > len(whole.input_ids) and len(calls) == 2


def test_without_a_home_nothing_is_kept(load, calls, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert len(tokens(load())) == 2 and not list(tmp_path.iterdir())
