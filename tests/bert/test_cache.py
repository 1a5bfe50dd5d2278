"""Arrays kept between runs are the arrays that tokenising would give, or they are not used."""

import dataclasses
import os
import tempfile
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from minilora import MiniloraError
from minilora.bert import cache, stored_rows
from minilora.bert.cache import mapped
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
    tokens(load(), [ROWS[0]._replace(label="b"), ROWS[1]])
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


def files_of(cache):
    """What the one entry of a cache holds, by file."""
    (entry,) = (cache / "minilora").iterdir()
    return {path: path.read_bytes() for path in entry.iterdir() if path.stat().st_size}


@pytest.mark.parametrize("name", ["input_ids", "arrays.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "another", "remove"])
def test_a_damaged_entry_is_tokenised_anew_and_replaced(damage, name, load, calls, tmp_path):
    expected = tokens(load())
    whole = files_of(tmp_path)
    (path,) = (path for path in whole if path.name == name)
    flipped = whole[path][:-1] + bytes([whole[path][-1] ^ 1])
    damaged = {"flip": flipped, "truncate": whole[path][:-9], "empty": b"", "another": b"{}"}
    path.unlink()  # what is mapped keeps the old file
    if damage != "remove":
        path.write_bytes(damaged[damage])
    assert_same(tokens(load()), expected)
    assert len(calls) == 2 and files_of(tmp_path) == whole


def test_every_flipped_byte_of_an_entry_is_noticed(load, calls, tmp_path):
    tokens(load())
    for path, whole in files_of(tmp_path).items():
        # A long hash needs no trial of each digit.
        for position in range(0, len(whole), 1 + len(whole) // 100):
            made, flipped = len(calls), bytes([whole[position] ^ 1])
            path.unlink()
            path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
            tokens(load())
            assert len(calls) == made + 1, (path.name, position)


def test_what_is_kept_lies_in_files_that_cannot_be_written_to(load, calls, tmp_path):
    for _ in range(2):  # made, and found
        kept = tokens(load())
        assert isinstance(kept.input_ids, np.memmap) and isinstance(kept.labels, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            kept.input_ids[0] = 1
    assert not isinstance(tokens(load(), keep=False).input_ids, np.memmap)
    assert len(calls) == 2


def test_without_a_place_to_keep_them_arrays_lie_in_a_nameless_file_or_in_memory(
    load, calls, monkeypatch, tmp_path
):
    expected = tokens(load())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "temporary").mkdir()
    for place, kind in (("temporary", np.memmap), ("gone", np.ndarray)):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
        found = tokens(load())
        assert type(found.input_ids) is kind and np.array_equal(found.labels, expected.labels)
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert not list((tmp_path / "temporary").iterdir())
    assert len(calls) == 3


def test_two_that_make_the_same_entry_at_once_get_the_same(calls, tmp_path):
    numbers = np.arange(5)

    def first():
        yield {"numbers": numbers[:2]}
        assert np.array_equal(mapped("key", second)["numbers"], numbers)
        yield {"numbers": numbers[2:]}

    def second():
        yield {"numbers": numbers}

    found = mapped("key", first)["numbers"]
    assert np.array_equal(found, numbers) and len(list((tmp_path / "minilora").iterdir())) == 1

    def never():
        raise AssertionError("it is kept")
        yield

    assert np.array_equal(mapped("key", never)["numbers"], numbers)
    assert np.array_equal(found, numbers)  # whose files have lost their names


def test_what_a_killed_process_left_in_the_cache_is_removed(load, calls, tmp_path):
    old, new = (
        tmp_path / "minilora" / f".tmp-{'a' * 64}-{end}" for end in ("01234567", "89abcdef")
    )
    for directory in (old, new):
        directory.mkdir(parents=True)
    a_day_ago = time.time() - cache.DAY - 1
    os.utime(old, (a_day_ago, a_day_ago))
    tokens(load())
    assert not old.exists() and new.exists()  # which a live process may be filling


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


def test_entries_of_other_code_are_not_taken(load, calls, monkeypatch):
    tokens(load())
    monkeypatch.setattr(cache, "_code", lambda: "of a reader that was mended")
    tokens(load())
    assert len(calls) == 2


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_entries_of_other_versions_are_not_taken(library, load, calls, monkeypatch):
    """The same state may be other tokens to them."""
    tokens(load())
    real = stored_rows.version
    monkeypatch.setattr(
        stored_rows, "version", lambda name: "0.1" if name == library else real(name)
    )
    tokens(load())
    tokens(load())
    assert len(calls) == 2


def test_the_mask_of_the_tokenizer_is_part_of_the_key(load, calls):
    tokens(load())
    other = load()
    other.mask_token = "[UNK]"
    tokens(other)
    tokens(load())
    assert len(calls) == 2
