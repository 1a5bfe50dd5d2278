"""python -m minilora.sweep: many runs, the worst paused for good, the best as if alone."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minilora import MiniloraError, files, sweep, sweeping
from minilora.sweeping import Run, Sweep
from tests.conftest import read_rows
from tests.forked import run_forked

NAME = "adapter_model.safetensors"


def flags(tiny_model, sentences, *more) -> list:
    return [
        "--model_name_or_path", tiny_model, "--train_file", sentences[0],
        "--validation_file", sentences[1], "--per_device_train_batch_size", 8,
        "--logging_steps", 1, "--device", "cpu", *more,
    ]  # fmt: skip


HALVED = ["--learning_rate", 1e-3, 1e-2, 3e-2, "--r", 2, 4, 8, "--max_steps", 9, "--halving", 3]


@pytest.fixture(scope="module")
def halved(tmp_path_factory, tiny_model, sentences):
    """A finished sweep of nine runs in three rungs, and what it printed."""
    out = tmp_path_factory.mktemp("sweeps") / "out"
    given = flags(tiny_model, sentences, *HALVED, "--output_dir", out)
    done = run_forked("sweep", *given, seconds=120)
    assert done.code == 0, done.err
    return out, done


def test_the_best_third_goes_on_after_each_third_of_the_steps(halved):
    out, done = halved
    found = Sweep.read(out)
    assert found.pauses() == [3, 6, None]
    assert [len(scores) for scores in found.scores] == [9, 3, 1]
    kept = sorted(found.scores[0], key=lambda name: found.scores[0][name])[:3]
    assert set(found.scores[1]) == set(kept)
    steps = [max(row["step"] for row in read_rows(out / f"run-{n:03}")) for n in range(9)]
    assert sorted(steps) == [3, 3, 3, 3, 3, 3, 6, 6, 9]
    assert done.summary()["best"] == str(out / f"run-{steps.index(9):03}")


def test_a_survivor_has_the_bits_of_a_run_that_was_never_paused(
    halved, tmp_path, tiny_model, sentences
):
    out, done = halved
    best = out / done.summary()["best"].rpartition("/")[2]
    run = next(run for run in Sweep.read(out).runs if run.name == best.name)
    given = flags(tiny_model, sentences, "--max_steps", 9, "--output_dir", tmp_path / "alone")
    apart = [word for flag, value in run.axes.items() for word in (f"--{flag}", value)]
    assert run_forked("train", *given, *apart).code == 0
    assert (best / NAME).read_bytes() == (tmp_path / "alone" / NAME).read_bytes()
    assert read_rows(best) == read_rows(tmp_path / "alone")


def test_the_table_names_each_run_its_score_and_what_sets_it_apart(halved):
    out, done = halved
    lines = done.out.splitlines()
    assert lines[0].split() == ["run", "rung", "eval_loss", "settings"]
    assert len(lines) == 12 and all("learning_rate" in line for line in lines[1:-2])
    assert lines[-2] == f"side by side: {out / 'report.html'}" and "run-008" in report_of(out)
    assert [line.split()[1] for line in lines[1:-2]] == ["3", "2", "2", *["1"] * 6]
    best = Sweep.read(out).table()[0]
    assert f"{best[2]:.4f}" == lines[1].split()[2]


def test_a_score_at_a_pause_is_what_evaluate_says_there(halved):
    out, _ = halved
    found = Sweep.read(out)
    name = next(name for name in found.scores[0] if name not in found.scores[1])
    done = run_forked("evaluate", out / name / "checkpoint-3", "--file", validation_of(found))
    assert done.summary()["eval_loss"] == found.scores[0][name]


def report_of(out) -> str:
    return (out / "report.html").read_text()


def validation_of(found: Sweep) -> str:
    return found.config().validation_file


@pytest.mark.slow
def test_a_sweep_killed_ten_times_ends_with_the_undisturbed_table(
    halved, tmp_path, tiny_model, sentences
):
    out, done = halved
    copy = tmp_path / "out"
    given = flags(tiny_model, sentences, *HALVED, "--output_dir", copy)
    for kill in range(10):  # of the 39 steps of all runs
        ended = run_forked("sweep", *given, prepare=lambda rows=4 * kill: die_after(copy, rows))
        assert ended.code == -signal.SIGKILL, ended.err
        if (copy / "sweep.json").exists():
            given = ["--resume_from_checkpoint", copy]
    ended = run_forked("sweep", *given, seconds=120)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[:-2] == done.out.splitlines()[:-2]
    found = (copy / "sweep.json").read_text()
    assert json.loads(found)["scores"] == json.loads((out / "sweep.json").read_text())["scores"]
    for place in out.glob("run-*"):
        assert read_rows(place) == read_rows(copy / place.name)


def die_after(out: Path, rows: int) -> None:
    """Kill this process within moments of its runs having written so many lines of metrics."""

    def watch() -> None:
        while sum(log.read_bytes().count(b"\n") for log in out.glob("*/metrics.jsonl")) < rows:
            time.sleep(0.005)
        time.sleep(0.1 * random.random())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def test_a_sweep_that_is_stopped_says_how_to_go_on(tmp_path, tiny_model, sentences):
    given = flags(tiny_model, sentences, "--r", 2, 4, "--max_steps", 5000)
    done = run_forked("sweep", *given, "--output_dir", tmp_path / "out", stop_after=4)
    assert done.code == 143
    assert f"python -m minilora.sweep --resume_from_checkpoint {tmp_path / 'out'}" in done.out
    assert done.summary()["finished"] is False


@pytest.mark.slow
def test_several_processes_find_the_same(halved, tmp_path):
    out, _ = halved
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    found = Sweep.read(copy)
    for scores in found.scores[1:]:
        scores.clear()
    for name in list(found.scores[0])[:2]:
        del found.scores[0][name]
        shutil.rmtree(copy / name)
    assert sweeping.run_sweep(found, copy, 2, lambda: False)
    assert found.scores == Sweep.read(out).scores


def run(name: str, **axes: str) -> Run:
    return Run(name, {"max_steps": 9}, {}, axes)


def test_candidates_are_judged_by_the_mean_of_their_seeds():
    runs = [run("a", r="1", seed="1"), run("b", r="1", seed="2")]
    runs += [run("c", r="2", seed="1"), run("d", r="2", seed="2")]
    found = Sweep(runs, 2, [{"a": 0.1, "b": 0.9, "c": 0.4, "d": 0.4}])
    assert [kept.name for kept in found.left(1)] == ["c", "d"]
    assert [row[0].name for row in found.table()] == ["c", "d", "a", "b"]


def test_of_accuracies_the_greatest_is_the_best_and_one_that_failed_the_last():
    runs = [
        Run(name, {"max_steps": 9, "metric_for_best_model": "accuracy"}, {}, {"r": name})
        for name in "abc"
    ]
    found = Sweep(runs, 3, [{"a": None, "b": 0.5, "c": 0.6}])
    assert [row[0].name for row in found.table()] == ["c", "b", "a"]
    assert [kept.name for kept in found.left(1)] == ["c"]


def grid(tiny_model, sentences, *more):
    given = [str(word) for word in flags(tiny_model, sentences, *more, "--output_dir", "x")]
    return sweep.grid(sweep.parse_arguments(given))


def test_a_list_is_one_value_unless_several_are_quoted(tiny_model, sentences):
    (one,) = grid(tiny_model, sentences, "--target_modules", "query", "value")
    assert one[1]["target_modules"] == ["query", "value"] and one[2] == {}
    two = grid(tiny_model, sentences, "--target_modules", "query", "query value")
    assert [lora["target_modules"] for _, lora, _ in two] == [["query"], ["query", "value"]]
    assert [axes for *_, axes in two] == [
        {"target_modules": "query"}, {"target_modules": "query value"}
    ]  # fmt: skip


def test_trials_are_of_the_grid_and_the_same_each_time(tiny_model, sentences):
    asked = ("--r", *range(1, 9), "--lora_alpha", 1, 2, 3, "--trials", 5)
    drawn = grid(tiny_model, sentences, *asked)
    pairs = {(lora["r"], lora["lora_alpha"]) for _, lora, _ in drawn}
    assert len(pairs) == 5 and drawn == grid(tiny_model, sentences, *asked)


def test_of_a_grid_too_large_to_be_listed_some_are_drawn(tiny_model, sentences):
    many = [word for name in ("r", "lora_alpha", "seed", "save_steps", "logging_steps", "max_steps")
            for word in (f"--{name}", *range(1, 101))]  # fmt: skip
    drawn = grid(tiny_model, sentences, *many, "--trials", 20)
    assert len(drawn) == 20
    for name in ("r", "lora_alpha", "seed", "max_steps"):
        assert len({(train | lora)[name] for train, lora, _ in drawn}) > 10


def test_seeds_are_runs_of_their_own(tiny_model, sentences):
    found = grid(tiny_model, sentences, "--r", 2, 4, "--seeds", 3, "--seed", 7)
    assert [train["seed"] for train, _, _ in found] == [7, 8, 9, 7, 8, 9]
    assert found[1][2] == {"r": "2", "seed": "8"}


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--r", 2, 0], "r is 0"),
        (["--learning_rate", 1e-3, "fast"], "invalid float value"),
        (["--seed", 1, 2, "--seeds", 2], "both given"),
        (["--halving", 3], "needs one --max_steps"),
        (["--halving", 3, "--max_steps", 2], "needs one --max_steps"),
        (["--eval_strategy", "no"], "compares evaluations"),
        (["--task", "regression", "sequence_classification"], "cannot be compared"),
        (["--halving", 1], "--halving is 1"),
        (["--validation_split", 0.2, "--halving", 2, "--max_steps", 4], "validation"),
        (["--seeds", 10**9], "1,000,000,000 runs of 1 combinations: at most 10,000 are made"),
        (["--r", *range(1, 200), "--lora_alpha", *range(1, 200)], "39,601 runs"),
        (["--learning_rat", 1], "did you mean --learning_rate?"),
        (["--class_weights", "good=2", "--r", 2, 4], "there is no class 'good'"),
        (["--dtype", "float32", "float16"], "float16 needs a GPU"),
        (["--max_length", 16, 1000], "max_length is 1000"),
        (["--max_length", 16, "--stride", 4, 14], "stride is 14"),
        (["--target_modules", "query", "query no_such", "--exclude_modules", "query"], "matches"),
        (["--r", 2, 4, 2], "--r has '2' twice"),
        (["--metric_for_best_model", "acuracy", "--r", 2, 4], "there is no eval_acuracy; computed"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_trains(
    command, tiny_model, sentences, tmp_path, more, fault
):
    done = command("sweep", *flags(tiny_model, sentences), *more, "--output_dir", tmp_path / "out")
    assert done.code == 2 and fault in done.err and not (tmp_path / "out").exists()


def test_what_a_sweep_began_with_is_not_changed_on_its_resume(command, tmp_path):
    asked = ("--resume_from_checkpoint", tmp_path, "--jobs", 2, "--r", 4, "--seeds", 2)
    done = command("sweep", *asked)
    assert done.code == 2 and "leave out --seeds, --r" in done.err


def test_a_flags_second_name_is_one_of_a_sweep(tiny_model, sentences):
    found = grid(tiny_model, sentences, "--lora_r", 2, 4)
    assert [lora["r"] for _, lora, _ in found] == [2, 4]


def test_several_data_sets_are_not_compared(command, tmp_path):
    asked = ("--dataset_name", "a", "b", "--output_dir", tmp_path / "out")
    done = command("sweep", *asked)
    assert done.code == 2 and "--dataset_name has several values" in done.err


def test_a_sweep_goes_on_from_another_directory(tmp_path, tiny_model, sentences, monkeypatch):
    monkeypatch.chdir(sentences[0].parent)
    names = [path.name for path in sentences]
    given = [str(w) for w in flags(tiny_model, names, "--r", 2, 4, "--output_dir", "x")]
    begun = sweeping.begin(tmp_path / "out", sweep.grid(sweep.parse_arguments(given)), None)
    assert [run.train["train_file"] for run in begun.runs] == [str(sentences[0].resolve())] * 2
    assert Sweep.read(tmp_path / "out").config().validation_file == str(sentences[1].resolve())


def test_a_run_that_stopped_early_is_scored_where_it_ended(
    tmp_path, tiny_model, sentences, command
):
    early = ("--early_stopping_patience", 1, "--learning_rate", 0.0, "--eval_strategy", "steps")
    asked = (*early, "--eval_steps", 1, "--max_steps", 9, "--halving", 3, "--r", 2, 4)
    done = command("sweep", *flags(tiny_model, sentences), *asked, "--output_dir", tmp_path / "out")
    assert done.code == 0 and "failed" not in done.out + done.err
    assert read_rows(tmp_path / "out" / "run-000")[-1]["step"] == 2  # before the first pause


def test_a_run_is_the_beginning_of_a_sweep(finished_run, tmp_path):
    asked = ["--config", str(finished_run / "run.json"), "--seed", "1", "2", "--output_dir", "x"]
    found = sweep.grid(sweep.parse_arguments(asked))
    assert [train["seed"] for train, _, _ in found] == [1, 2]
    assert all(lora["target_modules"] == "all-linear" for _, lora, _ in found)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, tiny_model, sentences, command):
    asked = ("--learning_rate", 1e-3, 1e30, "--max_steps", 4, "--output_dir", tmp_path / "out")
    done = command("sweep", *flags(tiny_model, sentences), *asked)
    assert done.code == 0 and "run-001 failed: step" in done.err
    assert done.out.splitlines()[2].split()[2] == "failed"
    assert done.summary()["best"].endswith("run-000")


def test_where_all_fail_none_is_the_best(tmp_path, tiny_model, sentences, command):
    asked = ("--learning_rate", 1e30, 1e35, "--max_steps", 4, "--output_dir", tmp_path / "out")
    done = command("sweep", *flags(tiny_model, sentences), *asked)
    assert [line.split()[2] for line in done.out.splitlines()[1:3]] == ["failed", "failed"]
    summary = done.summary()
    assert done.code == 1 and summary["finished"] and summary["best"] is None
    assert "side by side" not in done.out and not (tmp_path / "out" / "report.html").exists()


def test_what_no_sweep_wrote_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text('{"runs": [{"name": 3}], "halving": null, "scores": []}')
    with pytest.raises(MiniloraError, match=r"runs\.0"):
        Sweep.read(tmp_path)
    (tmp_path / "sweep.json").write_text('{"runs": [], "halving": null, "scores": []}')
    with pytest.raises(MiniloraError, match=r"sweep\.json has no runs"):
        Sweep.read(tmp_path)


def test_a_paused_run_whose_score_is_no_number_has_failed_at_once(
    tmp_path, tiny_model, sentences, command
):
    asked = ("--learning_rate", 1e-3, 1e38, "--max_steps", 2, "--halving", 2)
    out = tmp_path / "out"
    done = command("sweep", *flags(tiny_model, sentences), *asked, "--output_dir", out)
    assert done.code == 0 and done.out.splitlines()[2].split()[2] == "failed"
    again = command("sweep", "--resume_from_checkpoint", out)
    assert again.out == done.out


@contextlib.contextmanager
def endless(out, tiny_model, sentences):
    """A sweep by two processes in the midst of its runs, and those processes' ids."""
    asked = flags(tiny_model, sentences, "--r", 2, 4, 8, "--max_steps", 10**6, "--jobs", 2)
    asked = map(str, [*asked, "--eval_strategy", "epoch", "--output_dir", out])
    line = [sys.executable, "-m", "minilora.sweep", *asked]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(line, start_new_session=True, **pipes)
    try:
        until(lambda: len(list(out.glob("run-*/metrics.jsonl"))) == 2)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        ids = [int(pid) for pid in children if b"spawn_main" in read("cmdline", pid)]
        assert len(ids) == 2
        yield started, ids
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)  # what a fault has left behind, too
        started.communicate()


def read(name: str, pid: object) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


def until(is_so, seconds: int = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_that_holds_a_run(tmp_path, tiny_model, sentences):
    with endless(tmp_path / "out", tiny_model, sentences) as (started, _):
        places = [tmp_path / "out" / name for name in ("run-000", "run-001")]
        assert all(map(files.is_held, places))
        started.kill()
        until(lambda: not any(map(files.is_held, places)), seconds=5)


@pytest.mark.slow
def test_a_sweep_one_of_whose_processes_is_killed_says_so_and_ends(tmp_path, tiny_model, sentences):
    with endless(tmp_path / "out", tiny_model, sentences) as (started, ids):
        os.kill(ids[0], signal.SIGKILL)
        _, err = started.communicate(timeout=30)
    assert started.returncode == 1 and "error: a process was killed" in err
    assert not re.search("Traceback|leaked", err) and not files.is_held(
        tmp_path / "out" / "run-001"
    )


@pytest.mark.slow
def test_no_ctrl_c_reaches_the_processes_of_a_sweep(tmp_path, tiny_model, sentences):
    with endless(tmp_path / "out", tiny_model, sentences) as (started, ids):
        for pid in ids:  # of the threads that start with the process, too
            blocked = re.search(rb"SigBlk:\s*(\w+)", read("status", pid))
            assert int(blocked[1], 16) & 1 << signal.SIGINT - 1
        mine = re.search(rb"SigBlk:\s*(\w+)", read("status", started.pid))
        assert not int(mine[1], 16) & 1 << signal.SIGINT - 1
