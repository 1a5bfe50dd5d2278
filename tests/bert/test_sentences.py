"""The sentences that ship with minilora keep what their makers promised."""

import re
from collections import Counter

from minilora.bert.rows import read_rows
from minilora.bert.splits import SENTENCES

KINDS = {"plain", "negation", "mixed", "comparison", "irony"}
# Word sets that overlap by more than this share are near-duplicates.
NEAR = 0.5


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", text.lower()))


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def test_there_are_enough_and_both_labels_are_balanced_within_every_kind():
    train = list(read_rows(SENTENCES / "train.tsv"))
    validation = list(read_rows(SENTENCES / "validation.tsv"))
    assert len(train) + len(validation) >= 1000 and len(validation) >= 200
    for rows in (train, validation):
        counts = Counter((row.kind, row.label) for row in rows)
        assert {kind for kind, _ in counts} == KINDS
        for kind in KINDS:
            assert counts[kind, "positive"] == counts[kind, "negative"], kind


def test_no_sentence_occurs_twice_and_none_has_a_near_duplicate_across_the_split():
    train = [words(row.text) for row in read_rows(SENTENCES / "train.tsv")]
    validation = [words(row.text) for row in read_rows(SENTENCES / "validation.tsv")]
    assert len(set(train + validation)) == len(train + validation)
    worst = max((overlap(v, t), v, t) for v in validation for t in train)
    assert worst[0] < NEAR, worst


def test_the_near_duplicate_check_can_fail():
    """Negative control: a sentence with one word changed is found."""
    one = words("The soup was cold and the waiter never came back")
    other = words("The soup was cold and the waiter never came over")
    assert overlap(one, other) >= NEAR


def test_sentences_are_natural_in_length():
    lengths = [len(row.text.split()) for row in read_rows(SENTENCES / "train.tsv")]
    assert min(lengths) >= 4 and max(lengths) <= 45


def test_length_does_not_give_the_label_away():
    """The best threshold on the number of words separates the labels hardly better than chance."""
    rows = list(read_rows(SENTENCES / "train.tsv"))
    best = max(
        abs(
            sum((len(r.text.split()) > t) == (r.label == "positive") for r in rows) / len(rows)
            - 0.5
        )
        for t in range(5, 40)
    )
    assert best < 0.1
