"""Parquet files and data sets: what a jsonl file of them would give, in one line what is wrong."""

import json
import sys

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from minilora import MiniloraError, TrainConfig
from minilora.bert.rows import read_rows
from minilora.bert.splits import read_splits
from minilora.bert.tables import file_fingerprint, read_dataset
from minilora.bert.tasks import task_class

TEXT, CLASS = Value("string"), ClassLabel(names=["zz no", "aa yes"])
TAGS = ClassLabel(names=["O", "B-place"])
SQUAD = {"text": List(TEXT), "answer_start": List(Value("int32"))}
# Of each task, as the Hub has it: features, rows, and the rows with the names of classes.
CASES = {
    "sequence_classification": (
        {"sentence": TEXT, "label": CLASS, "idx": Value("int32")},
        [{"sentence": "so it is", "label": 0, "idx": 0}, {"sentence": "é", "label": 1, "idx": 1}],
        [{"label": "zz no"}, {"label": "aa yes"}],
    ),
    "regression": (
        {"sentence1": TEXT, "sentence2": TEXT, "label": Value("float32")},
        [{"sentence1": "a", "sentence2": "b", "label": 0.5}],
        [{}],
    ),
    "multi_label_classification": (
        {"text": TEXT, "labels": List(CLASS)},
        [{"text": "a", "labels": [0, 1]}, {"text": "b", "labels": []}],
        [{"labels": ["zz no", "aa yes"]}, {}],
    ),
    "token_classification": (
        {"id": TEXT, "tokens": List(TEXT), "ner_tags": List(TAGS)},
        [{"id": "7", "tokens": ["to", "Cork"], "ner_tags": [0, 1]}],
        [{"ner_tags": ["O", "B-place"]}],
    ),
    "question_answering": (
        {"id": TEXT, "context": TEXT, "question": TEXT, "answers": SQUAD},
        [
            {
                "id": "7",
                "context": "It stood in Cork.",
                "question": "Where?",
                "answers": {"text": ["Cork"], "answer_start": [12]},
            }
        ],
        [{}],
    ),
    "masked_lm": (
        {"text": TEXT},
        [{"text": "a text"}, {"text": ""}, {"text": "another"}],
        [{}] * 3,
    ),
}


def dataset_of(task: str) -> tuple[Dataset, list[dict]]:
    """The data set, and the rows that a jsonl file of it would have."""
    features, rows, named = CASES[task]
    records = [row | names for row, names in zip(rows, named, strict=True)]
    return Dataset.from_list(rows, Features(features)), records


def sentences_of(path) -> Dataset:
    names = ["negative", "positive"]
    pairs = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    rows = [{"text": text, "label": names.index(label)} for text, label in pairs]
    return Dataset.from_list(rows, Features({"text": TEXT, "label": ClassLabel(names=names)}))


def rows_of_parquet(path, rows):
    Dataset.from_list(rows).to_parquet(path)
    return list(read_rows(path))


def test_bytes_are_the_text_that_they_spell(tmp_path):
    """Some writers of parquet have no other texts; what is no text is refused where it is one."""
    pixels = {"image": b"\xff\xd8", "label": "b"}
    [row] = rows_of_parquet(tmp_path / "a.parquet", [{"text": "caf\xe9".encode(), **pixels}])
    assert (row.text, row.label) == ("caf\xe9", "b")
    with pytest.raises(MiniloraError, match=r"b\.parquet, line 1: the text holds half of a"):
        rows_of_parquet(tmp_path / "b.parquet", [{"text": b"\xff\xd8", **pixels}])


@pytest.fixture
def saved(tmp_path, sentences):
    """A directory with the tests' sentences, as `save_to_disk` leaves them."""
    train, validation = map(sentences_of, sentences)
    parts = {"train": train, "validation": validation, "unlabelled": validation}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("task", CASES)
def test_every_task_reads_them_as_it_reads_jsonl(task, tmp_path):
    dataset, records = dataset_of(task)
    dataset.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset.save_to_disk(tmp_path / "alone")

    def read(source, config, labelled):
        return list(task_class(task).read_rows(source, config, labelled))

    config = TrainConfig(task=task)
    for labelled in (True, False):
        expected = read(tmp_path / "a.jsonl", config, labelled)
        assert read(tmp_path / "a.parquet", config, labelled) == expected
        splits = read_dataset(str(tmp_path / "alone"), None, {"train": None, "validation": None})
        assert list(splits) == ["train"] and read(splits["train"], config, labelled) == expected


def test_a_class_that_is_none_is_an_error_with_its_place(tmp_path):
    features, rows, _ = CASES["sequence_classification"]
    unknown = Dataset.from_list([rows[0], rows[1] | {"label": -1}], Features(features))
    unknown.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(MiniloraError, match=r"a\.parquet, line 2: the label is None"):
        list(
            task_class("sequence_classification").read_rows(
                tmp_path / "a.parquet", TrainConfig(), labelled=True
            )
        )


def test_splits_are_those_of_the_data_set_and_the_test_is_on_demand(saved):
    splits = read_splits(TrainConfig(dataset_name=str(saved)))
    assert {split: len(rows) for split, rows in splits.rows.items()} == {
        "train": 44, "validation": 20,
    }  # fmt: skip
    assert splits.files["train"] == f"{saved}[train]" and splits.labels == ["negative", "positive"]
    names = {"validation_split_name": "unlabelled", "test_split_name": "validation"}
    splits = read_splits(TrainConfig(dataset_name=str(saved), **names))
    assert splits.files["validation"].endswith("[unlabelled]")
    assert splits.files["test"].endswith("[validation]")


def test_a_share_or_a_file_takes_the_place_of_the_data_sets_validation(saved, sentences):
    held_out = read_splits(TrainConfig(dataset_name=str(saved), validation_split=0.25))
    assert {split: len(rows) for split, rows in held_out.rows.items()} == {
        "train": 33, "validation": 11,
    }  # fmt: skip
    assert held_out.fingerprints["validation"] == held_out.fingerprints["train"]
    file = str(sentences[1])
    given = read_splits(TrainConfig(dataset_name=str(saved), validation_file=file))
    assert given.files["validation"] == file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"train_split_name": "training"},
            r"no split 'training' \(--train_split_name\), but train",
        ),
        ({"dataset_config_name": "sst2"}, "'sst2' not found"),
        ({"dataset_name": "nobody/nothing"}, "Couldn't reach 'nobody/nothing' on the Hub"),
        ({"dataset_name": "/gone/away"}, "Couldn't find any data file at /gone/away"),
    ],
)
def test_what_cannot_be_read_is_one_line(saved, arguments, message):
    with pytest.raises(MiniloraError, match=message) as raised:
        read_splits(TrainConfig(**{"dataset_name": str(saved), **arguments}))
    assert str(raised.value).startswith("dataset_name '") and "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_damaged_parquet_file_is_one_line(tmp_path, cut):
    dataset_of("regression")[0].to_parquet(tmp_path / "whole.parquet")
    path = tmp_path / "cut.parquet"
    path.write_bytes((tmp_path / "whole.parquet").read_bytes()[:cut])
    with pytest.raises(MiniloraError, match=r"cut\.parquet cannot be read: \w+[^\n]*$"):
        list(task_class("regression").read_rows(path, TrainConfig(), labelled=True))


def test_without_the_extra_the_line_names_it(saved, monkeypatch):
    dataset_of("regression")[0].to_parquet(saved / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for given in ({"dataset_name": str(saved)}, {"train_file": str(saved / "a.parquet")}):
        with pytest.raises(MiniloraError, match=r'needs pip install "minilora\[datasets\]": .*'):
            read_splits(TrainConfig(**given))


def test_a_fingerprint_is_of_the_rows_wherever_they_lie(saved, tmp_path, sentences):
    (tmp_path / "files").mkdir()
    train = sentences_of(sentences[0])
    train.to_parquet(tmp_path / "files" / "train.parquet")
    found = [read_splits(TrainConfig(dataset_name=str(p))) for p in (saved, tmp_path / "files")]
    assert found[0].fingerprints["train"] == found[1].fingerprints["train"]
    train.select(range(43)).to_parquet(tmp_path / "files" / "train.parquet")
    changed = read_splits(TrainConfig(dataset_name=str(tmp_path / "files")))
    assert changed.fingerprints["train"] != found[0].fingerprints["train"]


def test_a_parquet_files_fingerprint_is_of_its_bytes(tmp_path, sentences):
    sentences_of(sentences[0]).to_parquet(tmp_path / "a.parquet")
    splits = read_splits(TrainConfig(train_file=str(tmp_path / "a.parquet")))
    assert splits.fingerprints == {"train": file_fingerprint(tmp_path / "a.parquet")}
    assert splits.labels == ["negative", "positive"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train_file", "dataset_name"),
        ("validation_file", "validation_split_name"),
        ("test_file", "test_split_name"),
    ],
)
def test_a_split_has_one_source(one, other):
    given = {"dataset_name": "imdb", one: "a", other: "b"}
    with pytest.raises(MiniloraError, match=f"{one} and {other} are both given: leave one out"):
        TrainConfig(**given)


def test_names_of_splits_need_a_data_set():
    with pytest.raises(MiniloraError, match="are for a dataset_name: give it"):
        TrainConfig(test_split_name="test")
