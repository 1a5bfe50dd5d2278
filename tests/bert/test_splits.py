"""The files of a run read together."""

import hashlib

import numpy as np
import pytest
from transformers import AutoTokenizer

from minilora import MiniloraError, TrainConfig
from minilora.bert.dataset import tokenize
from minilora.bert.rows import read_rows
from minilora.bert.splits import SENTENCES, hold_out, read_splits
from tests.conftest import task_of


@pytest.fixture
def read(tmp_path):
    """Reads splits from the given texts of tsv files."""

    def read(arguments=None, **texts):
        files = {}
        for split, text in texts.items():
            (tmp_path / f"{split}.tsv").write_text(text)
            files[f"{split}_file"] = str(tmp_path / f"{split}.tsv")
        return read_splits(TrainConfig(**(arguments or {}), **files, seed=1))

    return read


TRAIN = "text\tlabel\n" + "".join(f"text {i}\t{'ab'[i % 2]}\n" for i in range(20))


def test_a_held_out_share_is_a_partition_that_depends_on_the_seed():
    train, validation = hold_out(50, 0.2, seed=1)
    assert len(validation) == 10
    assert sorted([*train, *validation]) == list(range(50))
    for part, same, other in zip(
        (train, validation), hold_out(50, 0.2, seed=1), hold_out(50, 0.2, seed=2), strict=True
    ):
        assert np.array_equal(part, same) and not np.array_equal(part, other)
        assert np.array_equal(part, np.sort(part))
    with pytest.raises(MiniloraError, match="leaves 0 for validation"):
        hold_out(50, 0.001, seed=1)


def test_without_a_training_file_there_are_the_packaged_sentences(read):
    splits = read()
    assert list(splits.rows["train"]) == list(read_rows(SENTENCES / "train.tsv"))
    validation = list(read_rows(SENTENCES / "validation.tsv"))
    assert list(splits.rows["validation"]) == validation
    assert splits.labels == ["negative", "positive"] and not splits.has_pairs()


def test_each_split_has_its_rows_its_file_and_the_hash_of_that(read, tmp_path):
    splits = read(train=TRAIN, test="text\tlabel\nmore\ta\n")
    assert {split: len(rows) for split, rows in splits.rows.items()} == {"train": 20, "test": 1}
    for split in ("train", "test"):
        assert splits.files[split] == str(tmp_path / f"{split}.tsv")
        data = (tmp_path / f"{split}.tsv").read_bytes()
        assert splits.fingerprints[split] == hashlib.sha256(data).hexdigest()


def test_the_validation_split_may_be_held_out_of_the_training_file(read):
    splits = read({"validation_split": 0.25}, train=TRAIN)
    assert len(splits.rows["train"]) == 15 and len(splits.rows["validation"]) == 5
    assert splits.files["validation"] == splits.files["train"]
    assert splits.fingerprints["validation"] == splits.fingerprints["train"]


@pytest.mark.parametrize(("train", "test"), [("one", "two"), ("two", "one")])
def test_splits_agree_on_pairs(read, train, test):
    texts = {"one": "text\tlabel\nx\ta\ny\tb\n", "two": "text\tpair\tlabel\nx\tz\ta\ny\tz\tb\n"}
    texts["two"] = texts["two"].replace("pair", "text_pair")
    with pytest.raises(MiniloraError, match=rf"test\.tsv has {test} .*train\.tsv has {train}"):
        read(train=texts[train], test=texts[test])
    assert read(train=texts["two"], test=texts["two"]).has_pairs()


def test_columns_hold_for_every_split(read):
    text = "body\tmood\nx\ta\ny\tb\n"
    splits = read({"text_column": "body", "label_column": "mood"}, train=text, validation=text)
    assert [row.label for row in splits.rows["validation"]] == ["a", "b"]


def test_numbers_need_no_names(read):
    assert read({"task": "regression"}, train="text\tlabel\nx\t1.5\ny\t2\n").labels is None


def test_a_label_that_training_does_not_know_is_refused_with_its_place(read, tiny_model):
    splits = read(train=TRAIN, validation="text\tlabel\nx\ta\ny\tneutral\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    task = task_of("sequence_classification", splits.labels)
    with pytest.raises(MiniloraError, match=r"validation\.tsv, line 3: label 'neutral' .* a, b"):
        tokenize(splits.rows["validation"], task, tokenizer, 8, splits.files["validation"])
