"""Rows lie in files: of a large file memory has as little as of a small one."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from minilora import MiniloraError, TrainConfig, fine_tune
from minilora.bert import rows as reading
from minilora.bert import stored_rows
from minilora.bert.dataset import tokenize
from minilora.bert.splits import read_splits
from minilora.bert.tasks import build_task, task_class
from tests.conftest import read_rows

TASK = task_class("sequence_classification")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minilora"


def write(path: Path, count: int) -> Path:
    """So many different rows, as the file's suffix has them."""
    texts = [f"the film was good and long and number {number}" for number in range(count)]
    labels = ["ab"[number % 2] for number in range(count)]
    pairs = list(zip(texts, labels, strict=True))
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in pairs]
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [f"text{mark}label", *(f"{text}{mark}{label}" for text, label in pairs)]
    path.write_text("\n".join(lines) + "\n")
    return path


def peak(call) -> int:
    """Bytes that a call has in memory at its worst, numpy's included."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_a_row_more_takes_few_bytes_of_memory_more(suffix, tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    few, many = (write(tmp_path / f"{count}{suffix}", count) for count in (2000, 8000))

    def prepare(path):
        config = TrainConfig(train_file=str(path))
        splits = read_splits(config)
        tokenize(splits.rows["train"], build_task(config, splits.labels), tokenizer, 64, "f")

    for _ in range(2):  # made, and found
        grown = peak(lambda: prepare(many)) - peak(lambda: prepare(few))
        assert grown < 6000 * 60  # numbers: where each example starts and ends, which row it is
    held = peak(lambda: list(reading.read_rows(many))) - peak(lambda: list(reading.read_rows(few)))
    assert held > 6000 * 200  # what rows take as objects


def test_rows_come_back_as_they_were_by_index_slice_and_turn(tmp_path):
    path = write(tmp_path / "a.tsv", 2500)
    expected = list(reading.read_rows(path))
    found = read_splits(TrainConfig(train_file=str(path))).rows["train"]
    assert list(found) == expected and len(found) == 2500
    assert found[0] == expected[0] and found[1700] == expected[1700]
    assert found[990:1010] == expected[990:1010]
    chosen = np.array([0, 7, 2499])
    assert list(found.take(chosen)) == [expected[index] for index in chosen]


def test_a_run_that_finds_its_data_kept_reads_no_row_and_trains_the_same(
    tmp_path, tiny_model, monkeypatch, cache
):
    train, validation = write(tmp_path / "a.tsv", 60), write(tmp_path / "b.tsv", 20)
    read = []
    for name in ("read_rows", "encode", "find_labels"):
        own = getattr(TASK, name)
        is_static = name != "encode"
        counted = lambda *given, own=own, name=name: read.append(name) or own(*given)  # noqa: E731
        monkeypatch.setattr(TASK, name, staticmethod(counted) if is_static else counted)

    def run(name, **changed):
        places = {"model_name_or_path": str(tiny_model), "output_dir": str(tmp_path / name)}
        files = {"train_file": str(train), "validation_file": str(validation)}
        fine_tune(TrainConfig(**places, **files, num_train_epochs=2, **changed))
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        return read_rows(tmp_path / name), {key: w.numpy().tobytes() for key, w in weights.items()}

    first = run("first")
    assert sorted(set(read)) == ["encode", "find_labels", "read_rows"]
    read.clear()
    assert run("second") == first and read == []
    assert run("third", seed=1) != first and read == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(train))  # no directory
    assert run("unkept") == first and read != []


def test_columns_and_held_out_shares_are_kept_apart(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tother\tlabel\n" + "".join(f"x{n}\ty{n}\t{n % 2}\n" for n in range(9)))

    def texts(**given):
        rows = read_splits(TrainConfig(train_file=str(path), **given)).rows
        return [[row.text for row in rows[split]] for split in rows]

    first, other = texts(label_column="label"), texts(text_column="other", label_column="label")
    assert first[0][0] == "x0" and other[0][0] == "y0"
    halves = texts(label_column="label", validation_split=0.5, seed=1)
    assert sorted(halves[0] + halves[1]) == first[0] and len(halves[0]) == 5
    assert halves != texts(label_column="label", validation_split=0.5, seed=2)
    path.write_text(path.read_text().replace("x0", "z0"))
    assert texts(label_column="label")[0][0] == "z0"


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "a.tsv", 50)
    config = TrainConfig(train_file=str(path))
    fingerprint = stored_rows.file_fingerprint(path)
    path.write_text(path.read_text() + "one more\ta\n")
    with pytest.raises(MiniloraError, match=r"a\.tsv was changed while it was read"):
        stored_rows.store_rows(path, TASK, config, fingerprint)
    assert not list(cache.iterdir())
    assert len(read_splits(config).rows["train"]) == 51
