"""evaluate: the numbers of training, in the same bits, on any labelled file."""

import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from transformers import BertModel, set_seed

from minilora import TrainConfig, evaluate_file, fine_tune, open_run, predict_texts
from tests.conftest import read_rows, tiny_config, write_sentences

TIMINGS = ("runtime", "samples_per_second", "steps_per_second")


def without_timings(metrics):
    return {k: v for k, v in metrics.items() if k.startswith("eval_") and not k.endswith(TIMINGS)}


@pytest.mark.parametrize("part", ["", "checkpoint-6", "checkpoint-3"])
def test_the_validation_file_gives_bitwise_trainings_numbers(
    part, finished_run, sentences, command
):
    rows = [row for row in read_rows(finished_run) if "eval_loss" in row]
    step = 3 if part == "checkpoint-3" else 6
    expected = next(row for row in rows if row["step"] == step)
    result = command("evaluate", finished_run / part, "--file", sentences[1])
    assert result.code == 0, result.err
    assert without_timings(result.summary()) == without_timings(expected)


def test_training_and_evaluation_differ_on_another_file(finished_run, tmp_path):
    """The check above can fail."""
    other = write_sentences(tmp_path / "other.tsv", 20, seed=9)
    scores = evaluate_file(open_run(finished_run), other)
    row = [row for row in read_rows(finished_run) if "eval_loss" in row][-1]
    assert scores.metrics["eval_loss"] != row["eval_loss"]


def test_the_confusion_matrix_counts_what_predict_says(finished_run, sentences, command):
    result = command("evaluate", finished_run, "--file", sentences[1], "--confusion_matrix")
    lines = sentences[1].read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    predicted = [row["label"] for row in predict_texts(open_run(finished_run), texts)]
    expected = confusion_matrix(labels, predicted, labels=["negative", "positive"])
    assert result.summary()["confusion_matrix"] == expected.tolist()
    assert result.summary()["labels"] == ["negative", "positive"]
    table = [line.split() for line in result.out.splitlines()[:3]]
    assert table[0][-2:] == ["negative", "positive"]
    assert np.array([row[1:] for row in table[1:]], dtype=int).tolist() == expected.tolist()


def test_another_base_model_is_one_line_and_exit_code_2(
    finished_run, tiny_model, sentences, tmp_path, command
):
    shutil.copytree(tiny_model, tmp_path / "other")
    set_seed(9)
    BertModel(tiny_config()).save_pretrained(tmp_path / "other")
    for name, flags in {
        "evaluate": ["--file", sentences[1]],
        "predict": ["--text", "good"],
        "merge": ["--output_dir", tmp_path / "merged"],
    }.items():
        moved = ["--model_name_or_path", tmp_path / "other"]
        result = command(name, finished_run, *flags, *moved)
        assert result.code == 2 and not result.out
        assert "error: " in result.err and "is an adapter for another base model" in result.err
    assert not (tmp_path / "merged").exists()


def test_regression_is_scored(tiny_model, tmp_path, command):
    path = tmp_path / "values.jsonl"
    rows = [{"text": "good " * (i % 7) + "bad", "label": i % 7 / 7} for i in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig(
        model_name_or_path=str(tiny_model), task="regression", train_file=str(path), device="cpu",
        validation_file=str(path), output_dir=str(tmp_path / "out"), max_steps=2,
    )  # fmt: skip
    result = fine_tune(config)
    flags = [tmp_path / "out", "--file", path, "--confusion_matrix"]
    found = command("evaluate", *flags).summary()
    assert without_timings(found) == without_timings(result.metrics)
    assert "confusion_matrix" not in found


def test_pairs_are_scored_from_the_columns_of_training(tiny_model, tmp_path, command):
    path = tmp_path / "pairs.tsv"
    rows = [f"good\tbad film\t{i % 3}" for i in range(24)]
    path.write_text("\n".join(["mine\tother\tverdict", *rows]))
    config = TrainConfig(
        model_name_or_path=str(tiny_model), train_file=str(path), validation_file=str(path),
        output_dir=str(tmp_path / "out"), max_steps=2, device="cpu", text_column="mine",
        text_pair_column="other", label_column="verdict",
    )  # fmt: skip
    result = fine_tune(config)
    found = command("evaluate", tmp_path / "out", "--file", path).summary()
    assert without_timings(found) == without_timings(result.metrics)
    renamed = tmp_path / "renamed.csv"
    renamed.write_text("\n".join(["p,q,l", *(row.replace("\t", ",") for row in rows)]))
    columns = ["--text_column", "p", "--text_pair_column", "q", "--label_column", "l"]
    found = command("evaluate", tmp_path / "out", "--file", renamed, *columns).summary()
    assert without_timings(found) == without_timings(result.metrics)


def test_one_text_where_training_had_two_is_refused(tiny_model, tmp_path, sentences, command):
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(f"good\tbad film\t{name}" for name in ["negative", "positive"] * 8))
    config = TrainConfig(
        model_name_or_path=str(tiny_model), train_file=str(path), max_steps=1, device="cpu",
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    fine_tune(config)
    result = command("evaluate", tmp_path / "out", "--file", sentences[1])
    assert (
        result.code == 2 and "there is no second text; the run was trained on pairs" in result.err
    )
    result = command("predict", tmp_path / "out", "--text", "good")
    assert result.code == 2 and "--text, line 1: there is no second text" in result.err
    assert command("predict", tmp_path / "out", "--text", "good", "--text_pair", "so").code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\ngood\tneutral\n", "line 2: label 'neutral' does not occur"),
        ("sentence_no\tverdict\ngood\tnegative\n", "none of the usual columns"),
        ("", "is empty"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_and_exit_code_2(
    content, message, finished_run, tmp_path, command
):
    (tmp_path / "bad.tsv").write_text(content)
    result = command("evaluate", finished_run, "--file", tmp_path / "bad.tsv")
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0]
    assert "Traceback" not in result.err and not result.out
