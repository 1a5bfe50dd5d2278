"""A long run: neither a save nor the memory grows with its log, and no row of it is lost.

Most runs here are of the saver, which saves at each of its four steps; so that four rows are many,
a checkpoint keeps one or two of its own.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from minilora import TrainConfig, fine_tune, save_checkpoint
from minilora.training import metrics_file
from minilora.training.checkpoint import read_checkpoint
from minilora.training.metrics_file import MetricsFile, read_rows, text_of
from minilora.training.resume import plan_resume
from minilora.training.run_directory import Saver
from tests.conftest import read_rows as rows_without_times
from tests.faults import saver
from tests.test_files import largest_file
from tests.training.test_damage import forge
from tests.training.test_resume import arguments, final_tensors, own_loop

WARNING = "its last rows begin the log"


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(metrics_file, "KEPT_ROWS", 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four steps and rows that kept checkpoint-3 and checkpoint-4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "KEPT_ROWS", 1)
        output_dir = tmp_path_factory.mktemp("long") / "run"
        assert saver.run(output_dir) == 0
    return output_dir


@pytest.fixture
def stopped(finished, tmp_path) -> Path:
    """The same, killed after checkpoint-3 and before its last rows."""
    output_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(output_dir / "checkpoint-4")
    return output_dir


def progress(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def assert_same_training(one: Path, other: Path) -> None:
    for name in ("adapter_model.safetensors", "checkpoint-4/optimizer.pt"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def rows_of(count: int, start: int = 0) -> list[dict]:
    """A row for each step, all of the same width."""
    return [{"step": 10**7 + step, "epoch": 0.5, "loss": 0.125} for step in range(start, count)]


@pytest.fixture
def log(tmp_path):
    """Begins a run's file and appends rows to it, as the loop does."""

    def log(rows, name="out", contents=None) -> MetricsFile:
        (tmp_path / name).mkdir(exist_ok=True)
        training = saver.build()
        file = MetricsFile(tmp_path / name / "metrics.jsonl", training.state, contents, id)
        for row in rows:
            training.state.log_history.append(row)
            file.append(row)
        return file

    return log


def test_a_save_and_the_memory_are_the_same_after_any_number_of_rows(log, monkeypatch):
    monkeypatch.setattr(metrics_file, "KEPT_ROWS", 100)
    sizes, kept = {}, {}
    for count in (200, 5_000):
        file = log(rows_of(count), name=str(count))
        training = saver.build()
        training.state = file.state
        Saver(training, record_of_the_saver(), file).save()
        (checkpoint,) = file.path.parent.glob("checkpoint-*")
        sizes[count] = (checkpoint / "trainer_state.json").stat().st_size
        kept[count] = len(training.state.log_history)
        assert read_checkpoint(checkpoint).metrics() == text_of(rows_of(count))
    assert sizes[200] == sizes[5_000] and kept[200] == kept[5_000] == 100


def record_of_the_saver():
    from minilora import RunRecord
    from minilora.training.record import environment

    return RunRecord(saver.CONFIG, saver.ADAPTER, None, False, {}, "toy", environment())


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_depends_on_the_rows_alone_and_has_the_last_evaluation(seed, log, monkeypatch):
    """However often the run was resumed on the way: so a resumed checkpoint has the same bytes."""
    draw = random.Random(seed)
    monkeypatch.setattr(metrics_file, "KEPT_ROWS", draw.randrange(1, 9))
    rows = [
        {"step": step, draw.choice(["loss", "loss", "eval_loss"]): 0.5}
        for step in range(draw.randrange(1, 40))
    ]
    state, at = log(rows).state, draw.randrange(len(rows))
    before = log(rows[:at], name="before").state.log_history
    resumed = log([*before, *rows[at:]], name="resumed").state
    assert state.log_history == resumed.log_history
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row for row in state.log_history if "eval_loss" in row][-1:] == evaluations[-1:]
    assert len(state.log_history) <= metrics_file.KEPT_ROWS + 1


def test_a_checkpoint_keeps_its_last_row_and_the_file_has_all(finished):
    assert [row["step"] for row in progress(finished / "checkpoint-4")] == [4]
    assert [row["step"] for row in read_rows(finished)] == [1, 2, 3, 4]
    stored = read_checkpoint(finished / "checkpoint-3")
    assert stored.metrics() == text_of(read_rows(finished)[:3])


def test_a_resume_cuts_the_file_at_its_checkpoint(stopped, finished, capfd):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9.9}\n{"ste')
    assert saver.run(stopped) == 0
    assert WARNING not in capfd.readouterr().err
    assert (stopped / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert_same_training(stopped, finished)


def change_a_digit(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"step": 1', b'"step": 7'))


@pytest.mark.parametrize(
    "change",
    [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-150]), change_a_digit],
    ids=["missing", "short", "changed"],
)
def test_without_the_file_a_resume_warns_and_trains_exactly(change, stopped, finished, capfd):
    (stopped / "metrics.jsonl").write_bytes(text_of(read_rows(stopped)[:3]))
    change(stopped / "metrics.jsonl")
    assert [WARNING in line for line in plan_resume(stopped).warnings] == [True]
    assert saver.run(stopped) == 0
    assert capfd.readouterr().err.count(WARNING) == 1
    assert_same_training(stopped, finished)
    assert read_rows(stopped) == read_rows(finished)[2:]  # the row that the checkpoint has, and on
    assert plan_resume(stopped).warnings == []


@pytest.mark.parametrize(
    "drop",
    [
        lambda document: document["state"].update(metrics_size=0),
        lambda document: document["state"].update(metrics_size=1),
        lambda document: document["state"].update(metrics_sha256=""),
    ],
    ids=["the size", "all but one byte", "the hash"],
)
def test_without_a_part_of_what_is_saved_of_the_log_rows_are_lost(drop, stopped, finished):
    """Negative control of the tests above: each part is needed."""
    forge(stopped / "checkpoint-3", drop)
    assert saver.run(stopped) == 0
    assert read_rows(stopped) != read_rows(finished)
    assert_same_training(stopped, finished)


def test_a_checkpoint_of_an_older_version_has_the_whole_log(stopped, finished):
    """Which the file is written from, whatever it holds."""
    checkpoint = stopped / "checkpoint-3"
    values = json.loads((checkpoint / "trainer_state.json").read_text())
    values["log_history"] = read_rows(finished)[:3]
    data = (json.dumps(values, indent=2) + "\n").encode()
    (checkpoint / "trainer_state.json").write_bytes(data)
    described = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def older(document):
        del document["state"]["metrics_size"], document["state"]["metrics_sha256"]
        document["files"]["trainer_state.json"] = described

    forge(checkpoint, older)
    (stopped / "metrics.jsonl").write_text("nonsense")
    assert saver.run(stopped) == 0
    assert read_rows(stopped) == read_rows(finished)


def test_a_loop_of_ones_own_keeps_its_whole_log(tmp_path):
    training = own_loop()
    training.state.log_history = rows_of(300)
    assert progress(save_checkpoint(tmp_path, training)) == rows_of(300)


def test_rows_that_a_disk_refuses_are_written_later(log, capsys):
    """In the midst of a line, and for many rows: the file is whole as soon as there is room."""
    file = log(rows_of(3))
    size = file.path.stat().st_size
    with largest_file(size + 20):
        for row in rows_of(8, start=3):
            file.append(row)
        with pytest.raises(OSError):
            file.sync()
    assert capsys.readouterr().err.count("the rows are kept for later") == 1
    file.append(rows_of(9, start=8)[0])
    assert file.path.read_bytes() == text_of(rows_of(9))
    file.sync()
    assert file.state.metrics_sha256 == hashlib.sha256(text_of(rows_of(9))).hexdigest()


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_file_removed_or_cut_during_a_run_begins_anew(change, log, capsys):
    file = log(rows_of(5))
    change(file.path)
    row = rows_of(6, start=5)[0]
    file.state.log_history.append(row)
    file.append(row)
    file.sync()
    assert capsys.readouterr().err.count("begins anew") == 1
    assert file.path.read_bytes() == text_of([row])
    assert file.state.metrics_size == len(text_of([row]))


def test_another_name_of_the_file_keeps_what_it_had(stopped, tmp_path):
    """A backup of hard links is not cut with the run."""
    before = (stopped / "metrics.jsonl").read_bytes()
    (tmp_path / "backup").hardlink_to(stopped / "metrics.jsonl")
    assert saver.run(stopped) == 0
    assert (tmp_path / "backup").read_bytes() == before


def test_the_whole_log_goes_with_a_run_to_another_directory(
    tmp_path, tiny_model, sentences, monkeypatch
):
    """Evaluations too, of which the best is older than any row that its checkpoint keeps."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    values = arguments(tiny_model, sentences, save_strategy="epoch", num_train_epochs=3, **best)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "kept")))
    monkeypatch.setattr(metrics_file, "KEPT_ROWS", 100)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    whole = rows_without_times(tmp_path / "whole")
    assert rows_without_times(tmp_path / "kept") == whole and len(whole) > 10
    for name, tensor in final_tensors(tmp_path / "whole").items():
        assert (final_tensors(tmp_path / "kept")[name] == tensor).all()
    monkeypatch.setattr(metrics_file, "KEPT_ROWS", 1)
    place = {"output_dir": str(tmp_path / "new")}
    result = fine_tune(
        TrainConfig(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-12"), **place)
    )
    assert rows_without_times(tmp_path / "new") == whole
    assert result.log_history == read_rows(tmp_path / "new")
    losses = [row["eval_loss"] for row in whole if "eval_loss" in row]
    assert min(losses) != losses[-1], "the best must not be what a resume reads anyway"
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        (tmp_path / "kept" / name).unlink()
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "kept")))
    for name, tensor in final_tensors(tmp_path / "whole").items():
        assert (final_tensors(tmp_path / "kept")[name] == tensor).all()
