"""The examples for clusters, run under bash with stand-ins for the cluster's commands."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from minilora.train import parse_arguments
from tests.conftest import read_rows

EXAMPLES = Path(__file__).parent.parent / "examples"
SLURM = EXAMPLES / "slurm.sbatch"
JOB = {"SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}
STAND_INS = {
    # One of these leaves srun's words; the other starts a process for each task.
    "srun": """shift; printf '%s\\0' "$@" > words""",
    "srun that starts": """shift
for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & echo $! >> tasks; done
trap : TERM
wait -n; code=$?; wait; exit $code""",
    "scontrol": """[[ $1 != requeue ]] && echo localhost || echo "$2" >> requeued""",
    "scancel": """[[ $1 = --signal=TERM ]] && xargs kill -TERM < tasks""",
    "python": """printf '%s\\0' "$@" > words""",
}


def stand_in(directory: Path, *names: str) -> dict[str, str]:
    """An environment in which these commands, or these kinds of them, are stand-ins."""
    place = directory / "bin"
    place.mkdir(exist_ok=True)
    for name in names:
        path = place / name.split()[0]
        path.write_text(f"#!/bin/bash\n{STAND_INS[name]}\n")
        path.chmod(0o755)
    path = f"{place}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **JOB, "SLURM_JOB_NODELIST": "n[1-2]", "PATH": path}


def words(directory: Path) -> list[str]:
    return (directory / "words").read_text().split("\0")[:-1]


def bash(directory: Path, script: str, environment: dict[str, str]) -> None:
    subprocess.run(["bash", "-c", script], cwd=directory, env=environment, check=True)


def assert_started(flags: list[str], run: str) -> None:
    train, lora = parse_arguments(flags)
    assert train["output_dir"] == run and train["save_strategy"] == "steps"
    assert lora == {"r": 8}


def test_slurm_starts_a_run_and_then_resumes_it(tmp_path):
    environment, run = stand_in(tmp_path, "srun", "scontrol"), tmp_path / "runs" / "slurm"
    bash(tmp_path, SLURM.read_text(), environment)
    *start, name, first = words(tmp_path)[:4]
    assert start == ["bash", "-c"] and "exec python -m minilora.train" in name
    assert first == "minilora"
    assert_started(words(tmp_path)[4:], str(run))
    run.mkdir(parents=True)
    (run / "run.json").touch()
    bash(tmp_path, SLURM.read_text(), environment)
    assert parse_arguments(words(tmp_path)[4:]) == ({"resume_from_checkpoint": str(run)}, {})
    assert not (tmp_path / "requeued").exists()


def test_slurms_options_are_slurms():
    lines = [line.split()[1] for line in SLURM.read_text().splitlines() if "#SBATCH" in line]
    assert {"--requeue", "--signal=B:USR1@180"} <= set(lines)
    assert all(line.startswith("--") for line in lines)


def test_kubernetes_starts_a_run_and_then_resumes_it(tmp_path):
    job = yaml.safe_load((EXAMPLES / "kubernetes_pytorchjob.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
    master, worker = (job["spec"]["pytorchReplicaSpecs"][who] for who in ("Master", "Worker"))
    assert master["replicas"] == 1 and master["template"] == worker["template"]
    (container,) = master["template"]["spec"]["containers"]
    assert container["name"] == "pytorch" and container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    environment, run = stand_in(tmp_path, "python"), tmp_path / "runs" / "kubernetes"
    script = script.replace("/shared", str(tmp_path))
    bash(tmp_path, script, environment)
    assert words(tmp_path)[:2] == ["-m", "minilora.train"]
    assert_started(words(tmp_path)[2:], str(run))
    run.mkdir(parents=True)
    (run / "run.json").touch()
    bash(tmp_path, script, environment)
    assert parse_arguments(words(tmp_path)[2:]) == ({"resume_from_checkpoint": str(run)}, {})


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_is_queued_again(tmp_path, tiny_model, sentences):
    """Two real processes; the resumed job ends the run."""
    environment = stand_in(tmp_path, "srun that starts", "scontrol", "scancel")
    script = SLURM.read_text().replace("bert-base-uncased", str(tiny_model))
    for name, path in zip(("train.tsv", "dev.tsv"), sentences, strict=True):
        script = script.replace(name, str(path))
    script = script.replace("--num_train_epochs 3", "--num_train_epochs 60 --logging_steps 1")
    how = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    rows = tmp_path / "runs" / "slurm" / "metrics.jsonl"
    job = subprocess.Popen(["bash", "-c", script], **how)
    for _ in range(600):
        if rows.exists() and rows.stat().st_size:
            break
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    _, told = job.communicate(timeout=100)
    assert job.returncode == 128 + signal.SIGTERM, told
    assert (tmp_path / "requeued").read_text() == "7\n"
    (checkpoint,) = rows.parent.glob("checkpoint-*")
    (tmp_path / "tasks").unlink()
    job = subprocess.Popen(["bash", "-c", script], **how)
    _, told = job.communicate(timeout=100)
    assert job.returncode == 0 and f"resuming {checkpoint}" in told, told
    assert (tmp_path / "requeued").read_text() == "7\n"
    losses = [row["step"] for row in read_rows(rows.parent) if "loss" in row]
    assert losses == list(range(1, 121))


FOLLOW = EXAMPLES / "follow_metrics.py"


def test_a_finished_run_is_followed_to_its_end(finished_run):
    command = [sys.executable, FOLLOW, finished_run]
    out = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    assert [int(line.split()[0]) for line in out.splitlines()] == [
        row["step"] for row in read_rows(finished_run)
    ]


def test_a_run_that_is_cut_and_goes_on_is_told_once(finished_run, tmp_path, monkeypatch):
    """Between two looks: rows appear, the last half of one; a resume cuts and repeats them."""
    namespace = runpy.run_path(str(FOLLOW))
    rows = (finished_run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    begun = {**json.loads((finished_run / "run.json").read_text())}
    result = begun.pop("result")
    looks = [rows[:1], [*rows[:5], rows[5][:9]], rows[:3], rows[:4], rows]

    def next_look(_):
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(looks.pop(0)))
        (tmp_path / "run.json").write_text(
            json.dumps(begun if looks else {**begun, "result": result})
        )

    monkeypatch.setattr(time, "sleep", lambda seconds: next_look(seconds) if looks else None)
    told = []
    namespace["follow"](tmp_path, lambda values, step: told.append({"step": step, **values}))
    assert told == [json.loads(row) for row in rows]
