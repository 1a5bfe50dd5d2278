"""Tokens kept between runs are the tokens that tokenising would give, or they are not used."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from minilora.bert import token_cache
from minilora.bert.data import tokenize
from minilora.bert.tables import Row
from minilora.bert.token_cache import cache_directory, tokenize_once, tokenizer_fingerprint

LABELS = np.array([0, 1])


def rows_of(*texts):
    return [Row(text, None, "a", None, line) for line, text in enumerate(texts, start=1)]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """How often the tokenizer itself was asked; the cache is empty at first."""
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        token_cache, "tokenize", lambda *arguments: made.append(1) or tokenize(*arguments)
    )
    return made


def once(tokenizer, rows, max_length=8):
    return tokenize_once(rows, LABELS, tokenizer, tokenizer_fingerprint(tokenizer), max_length, "")


def test_the_second_time_the_tokens_come_from_the_cache(tokenizer, tiny_model, calls):
    rows = rows_of("the film was good", "so dull and bad and long and long")
    first = once(tokenizer, rows)
    again = once(AutoTokenizer.from_pretrained(tiny_model), rows)
    assert len(calls) == 1
    for name in ("input_ids", "token_type_ids", "offsets", "labels"):
        one, other = getattr(first, name), getattr(again, name)
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert again.truncated == first.truncated == 1


def test_another_text_length_or_tokenizer_is_another_entry(tokenizer, tiny_model, calls):
    once(tokenizer, rows_of("the film", "good"))
    once(AutoTokenizer.from_pretrained(tiny_model), rows_of("the film", "bad"))
    once(AutoTokenizer.from_pretrained(tiny_model), rows_of("the film", "good"), max_length=9)
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["goodish"])
    once(other, rows_of("the film", "good"))
    assert len(calls) == 4


def test_texts_that_only_join_to_the_same_are_told_apart(tokenizer, tiny_model, calls):
    once(tokenizer, [Row("a b", "c", "a", None, 1), Row("d", "e", "a", None, 2)])
    once(
        AutoTokenizer.from_pretrained(tiny_model),
        [Row("a", "b c", "a", None, 1), Row("d", "e", "a", None, 2)],
    )
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "another"])
def test_a_damaged_entry_is_tokenised_anew_and_replaced(damage, tokenizer, tiny_model, calls):
    rows = rows_of("the film was good", "so dull")
    expected = once(tokenizer, rows)
    (path,) = cache_directory().iterdir()
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes(
        {"flip": flipped, "truncate": whole[:-9], "empty": b"", "another": b"{}"}[damage]
    )
    found = once(AutoTokenizer.from_pretrained(tiny_model), rows)
    assert len(calls) == 2 and np.array_equal(found.input_ids, expected.input_ids)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tokenizer, calls, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(once(tokenizer, rows_of("the film", "good"))) == 2
