"""Curves show what metrics.jsonl says, each step once, and never touch the run."""

import dataclasses
import json
import math
import shutil
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minilora import MiniloraError, TrainConfig
from minilora.fine_tuning import run_fine_tuning
from minilora.trained.directory import inspect_directory
from minilora.training.record import RunRecord
from minilora.training.tensorboard import Curves
from tests.conftest import read_rows


@pytest.fixture
def train(tiny_model, sentences, tmp_path):
    """Trains six steps, or resumes; returns the directory."""

    def train(name="out", **changes):
        arguments = {
            "model_name_or_path": str(tiny_model), "train_file": str(sentences[0]),
            "validation_file": str(sentences[1]), "output_dir": str(tmp_path / name),
            "max_steps": 6, "logging_steps": 1, "device": "cpu", "report_to": "tensorboard",
        }  # fmt: skip
        run_fine_tuning({**arguments, **changes}, {}, lambda: False)
        return tmp_path / name

    return train


def resume(output_dir, **changes):
    run_fine_tuning({"resume_from_checkpoint": str(output_dir), **changes}, {}, lambda: False)


def curves_of(output_dir):
    """Tag -> [(step, value)], as TensorBoard shows them."""
    events = EventAccumulator(str(output_dir / "runs")).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def curves_in(rows):
    """The same of the rows of metrics.jsonl, under the names of HF's callback."""
    found = {}
    for row in rows:
        is_evaluation = "eval_loss" in row
        for name, value in row.items():
            tag = name.replace("eval_", "eval/") if is_evaluation else f"train/{name}"
            if name != "step" and not (is_evaluation and name == "epoch"):
                found.setdefault(tag, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return found


def adapter(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def test_the_curves_are_the_rows_of_the_log_and_the_arguments(train):
    out = train()
    found = curves_of(out)
    assert found == curves_in(read_rows(out, timing=True))
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "eval/loss",
            "eval/accuracy", "eval/runtime"} <= found.keys()  # fmt: skip
    events = EventAccumulator(str(out / "runs")).Reload()
    [text] = events.Tensors("args/text_summary")
    told = text.tensor_proto.string_val[0].decode().strip("`\n")
    assert json.loads(told)["arguments"]["max_steps"] == 6


def test_a_resumed_run_shows_each_step_once(train):
    """The rows that a killed run showed behind its checkpoint, and would show again."""
    out = train()
    whole = read_rows(out)
    (out / "run.json").write_text(
        json.dumps(
            {k: v for k, v in json.loads((out / "run.json").read_text()).items() if k != "result"}
        )
    )
    shutil.rmtree(out / "checkpoint-6")
    resume(out)
    assert read_rows(out) == whole and len(list((out / "runs").iterdir())) == 2
    found = curves_of(out)
    assert found == curves_in(read_rows(out, timing=True))
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_curves_that_begin_with_a_resume_begin_with_the_rows_before_it(train):
    out = train(report_to="none")
    assert not (out / "runs").exists()
    shutil.rmtree(out / "checkpoint-6")
    resume(out, report_to="tensorboard")
    assert curves_of(out) == curves_in(read_rows(out, timing=True))


def test_a_value_that_was_no_number_ends_no_curve(train):
    out = train(report_to="none")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": null}\n')  # as NaN is written
    record = RunRecord.read(out)
    asked = dataclasses.replace(record.arguments, report_to="tensorboard")
    curves = Curves(out, dataclasses.replace(record, arguments=asked))
    curves.append({"step": 8, "loss": 1.0})
    *_, (step, value), last = curves_of(out)["train/loss"]
    assert step == 7 and math.isnan(value) and last == (8, 1.0)


def test_a_run_is_the_same_to_the_last_bit_with_and_without_curves(train):
    with_curves, without = train(), train("without", report_to="none")
    assert adapter(with_curves) == adapter(without)
    assert read_rows(with_curves) == read_rows(without)


def test_a_place_that_cannot_be_written_is_said_once_and_ends_nothing(train, capsys):
    out = train(report_to="none")
    whole = adapter(out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "runs").write_text("in the way")
    resume(out, report_to="tensorboard")
    assert capsys.readouterr().err.count("runs cannot be written") == 1
    assert adapter(out) == whole


def test_what_reads_a_run_does_not_mind_them(train):
    out = train(save_total_limit=1)
    found = inspect_directory(out)
    assert found["kind"] == "run" and found["verified"] and not found["problems"]
    assert found["position"]["checkpoints"] == ["checkpoint-6"]
    with pytest.raises(MiniloraError, match="is not empty"):
        train()


def test_without_the_extra_the_line_names_it(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MiniloraError, match=r'pip install "minilora\[tensorboard\]"'):
        train()


@pytest.mark.parametrize("name", ["wandb", "all", "tensorboard,mlflow", ""])
def test_another_tracker_is_refused_with_the_way_to_it(name):
    with pytest.raises(MiniloraError, match=r"none or tensorboard: .*follow_metrics\.py"):
        TrainConfig(report_to=name)
