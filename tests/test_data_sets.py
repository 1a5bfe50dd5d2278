"""Runs on data sets and parquet files: the bits of the same rows as text, resumes too."""

import json
import shutil

import pytest

from minilora.fine_tuning import run_fine_tuning
from tests.bert.test_tables import saved, sentences_of  # noqa: F401
from tests.conftest import read_rows


def flags(tiny_model, output_dir, *data):
    model = ("--model_name_or_path", tiny_model, "--device", "cpu", "--save_strategy", "steps")
    return (*model, "--save_steps", 2, "--max_steps", 4, *data, "--output_dir", output_dir)


@pytest.fixture
def run(command, tiny_model, tmp_path, saved):  # noqa: F811
    """The directory of a finished run on a data set."""
    done = command("train", *flags(tiny_model, tmp_path / "run", "--dataset_name", saved))
    assert done.code == 0, done.err
    return tmp_path / "run"


def adapter(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def test_a_run_on_a_data_set_is_bitwise_that_on_the_same_rows_in_files(
    run, command, tiny_model, tmp_path, sentences
):
    for kind in ("tsv", "parquet"):
        files = list(sentences)
        if kind == "parquet":
            files = [tmp_path / f"{file.stem}.parquet" for file in files]
            for text, table in zip(sentences, files, strict=True):
                sentences_of(text).to_parquet(table)
        data = ("--train_file", files[0], "--validation_file", files[1])
        assert command("train", *flags(tiny_model, tmp_path / kind, *data)).code == 0
        assert adapter(tmp_path / kind) == adapter(run)
        assert read_rows(tmp_path / kind) == read_rows(run)


def test_evaluate_and_predict_take_parquet_files(run, command, tmp_path, sentences):
    sentences_of(sentences[1]).to_parquet(tmp_path / "a.parquet")
    for name in ("evaluate", "predict"):
        table, text = (
            command(name, run, "--file", f) for f in (tmp_path / "a.parquet", sentences[1])
        )
        assert table.code == 0, table.err
        if name == "evaluate":
            assert table.summary()["eval_loss"] == text.summary()["eval_loss"]
            assert table.summary()["eval_loss"] == read_rows(run)[-1]["eval_loss"]
        else:
            assert table.out.splitlines()[:-1] == text.out.splitlines()[:-1] != []


def test_a_resume_reads_the_data_set_again_and_ends_in_the_same_bits(run, tmp_path):
    recorded = json.loads((run / "run.json").read_text())["arguments"]
    assert recorded["dataset_name"] == str(tmp_path / "saved") and recorded["train_file"] is None
    whole = adapter(run)
    shutil.rmtree(run / "checkpoint-4")
    run_fine_tuning({"resume_from_checkpoint": str(run)}, {}, lambda: False)
    assert adapter(run) == whole


def test_a_data_set_that_has_moved_is_known_and_another_is_refused(
    run, command, tmp_path, sentences
):
    shutil.rmtree(run / "checkpoint-4")
    (tmp_path / "saved").rename(tmp_path / "moved")
    resume = ("train", "--resume_from_checkpoint", run)
    gone = command(*resume)
    assert gone.code == 2 and f"dataset_name '{tmp_path / 'saved'}' cannot be read" in gone.err
    other = tmp_path / "other"
    other.mkdir()
    sentences_of(sentences[0]).select(range(40)).to_parquet(other / "train.parquet")
    sentences_of(sentences[1]).to_parquet(other / "validation.parquet")
    refused = command(*resume, "--dataset_name", other)
    assert refused.code == 2 and f"began with: train file ({other})" in refused.err
    assert command(*resume, "--dataset_name", tmp_path / "moved").code == 0


def test_the_card_names_the_data_set(run):
    assert "On `a part of saved`: accuracy" in (run / "README.md").read_text()
