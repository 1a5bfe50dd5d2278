"""`python -m minilora.train` itself, from its first instruction: killed by strace, or by signals.

A sample, since each run imports torch and transformers; `test_every_call.py` takes every call, in
forks of a process that has imported them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from minilora import latest_checkpoint
from minilora.files import LEFTOVER
from minilora.training.checkpoint import read_checkpoint, sorted_checkpoints
from tests.conftest import read_rows
from tests.faults.command import fresh_flags
from tests.faults.strace import needs_strace

TRAIN = [sys.executable, "-m", "minilora.train"]
RESUME = [*TRAIN, "--resume_from_checkpoint"]


def command(tiny_model, sentences, output_dir) -> list[str]:
    return [*TRAIN, *fresh_flags(tiny_model, *sentences, output_dir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, sentences) -> Path:
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(tiny_model, sentences, output_dir), check=True, capture_output=True)
    return output_dir


def assert_same_run(output_dir: Path, whole: Path) -> None:
    assert read_rows(output_dir) == read_rows(whole)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (output_dir, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    names = {path.name for path in output_dir.iterdir() if "checkpoint-" not in path.name}
    assert names == {path.name for path in whole.iterdir() if "checkpoint-" not in path.name}


# Calls of the main thread whose number does not depend on how fast the machine is. A fresh run
# makes 7 mkdir, 15 rename and 56 fsync.
KILLS = [
    ("mkdir", 4), ("rename", 1), ("rename", 6), ("fsync", 27), ("unlinkat", 5),
]  # fmt: skip


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(("call", "number"), KILLS)
def test_a_kill_at_a_call_loses_nothing(call, number, tmp_path, tiny_model, sentences, whole):
    output_dir = tmp_path / "out"
    # Not with --seccomp-bpf, under which strace 6.1 injects errors, but no signals.
    strace = [
        "strace", "-f", "-qq", "-o", str(tmp_path / "log"), "-e", f"trace={call}", "-e",
        f"inject={call}:signal=SIGKILL:when={number}",
    ]  # fmt: skip
    killed = subprocess.run(
        [*strace, *command(tiny_model, sentences, output_dir)], capture_output=True
    )
    assert killed.returncode in (-9, 137), killed.stderr
    for checkpoint in sorted_checkpoints(output_dir):
        read_checkpoint(checkpoint)
    latest = latest_checkpoint(output_dir)
    assert get_last_checkpoint(str(output_dir)) == (str(latest) if latest else None)
    again = subprocess.run([*RESUME, output_dir], capture_output=True, text=True)
    if again.returncode == 2:  # killed before run.json: there is nothing to go on from
        assert "neither a complete checkpoint-<step> nor a run.json" in again.stderr
        subprocess.run(command(tiny_model, sentences, output_dir), check=True, capture_output=True)
    assert_same_run(output_dir, whole)
    assert not [path for path in output_dir.rglob("*") if LEFTOVER.fullmatch(path.name)]


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize(
    ("call", "number", "error"),
    [("fsync", 9, "ENOSPC"), ("fsync", 27, "EIO"), ("rename", 14, "ENOSPC")],
)
def test_a_refusal_of_a_call_loses_nothing(
    call, number, error, tmp_path, tiny_model, sentences, whole
):
    output_dir = tmp_path / "out"
    strace = [
        "strace", "-f", "-qq", "--seccomp-bpf", "-o", str(tmp_path / "log"), "-e",
        f"trace={call}", "-e", f"inject={call}:error={error}:when={number}",
    ]  # fmt: skip
    refused = subprocess.run(
        [*strace, *command(tiny_model, sentences, output_dir)], capture_output=True, text=True
    )
    lines = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in refused.stderr
    assert refused.returncode == len(lines) and refused.returncode in (0, 1), refused.stderr
    if refused.returncode == 0:
        assert "training goes on" in refused.stderr or "kept for later" in refused.stderr
        assert_same_run(output_dir, whole)
    subprocess.run([*RESUME, output_dir], check=True, capture_output=True)
    assert_same_run(output_dir, whole)


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(process: subprocess.Popen, happened) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def is_importing_torch(process: subprocess.Popen) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_during_the_imports_is_one_line_and_an_exit_code(
    number, code, tmp_path, tiny_model, sentences, whole
):
    """There is no step to finish yet, and nothing is lost: the run begins where it was stopped."""
    output_dir = tmp_path / "out"
    process = start(command(tiny_model, sentences, output_dir))
    wait_until(process, lambda: is_importing_torch(process))
    process.send_signal(number)
    printed, said = process.communicate(timeout=100)
    assert process.returncode == code, said
    assert "Traceback" not in said and "stopping after this step" in said
    assert json.loads(printed.splitlines()[-1])["global_step"] == 0
    subprocess.run([*RESUME, output_dir], check=True, capture_output=True)
    assert_same_run(output_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once_and_corrupts_nothing(
    second, tmp_path, tiny_model, sentences, whole
):
    output_dir = tmp_path / "out"
    process = start(command(tiny_model, sentences, output_dir))
    wait_until(process, (output_dir / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    process.send_signal(second)
    _, said = process.communicate(timeout=100)
    # To a shell these are 143 and 130, too. Of two signals that come together python sees the one
    # with the lower number first; and the run may be quicker to end than the second.
    assert process.returncode in (-15, -2, 143, 130, 0), said
    assert "Traceback" not in said
    subprocess.run([*RESUME, output_dir], check=True, capture_output=True)
    assert_same_run(output_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "delay"),
    [
        *((signal.SIGTERM, delay) for delay in (0.2, 2.0, 4.0)),
        *((signal.SIGINT, delay) for delay in (0.3, 1.0, 3.0)),
    ],
)
def test_a_signal_at_any_time_ends_in_the_documented_way(
    number, delay, tmp_path, tiny_model, sentences
):
    """Exit code 128 + n, or the signal itself, which is the same to a shell; never a traceback."""
    output_dir = tmp_path / "out"
    process = start(command(tiny_model, sentences, output_dir))
    time.sleep(delay)
    process.send_signal(number)
    _, said = process.communicate(timeout=100)
    assert process.returncode in (128 + number, -number, 0), said
    assert "Traceback" not in said
    for checkpoint in sorted_checkpoints(output_dir):
        read_checkpoint(checkpoint)


def test_a_second_run_on_the_same_directory_is_refused(tmp_path, tiny_model, sentences):
    """While the first lives; its lock is not in the way once it is dead."""
    output_dir = tmp_path / "out"
    flags = [*command(tiny_model, sentences, output_dir), "--max_steps", "100000"]
    first = start([*flags, "--eval_steps", "100000"])
    wait_until(first, (output_dir / "checkpoint-2").exists)
    second = subprocess.run([*RESUME, output_dir], capture_output=True, text=True)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and "is in use by another run" in second.stderr
    assert (output_dir / ".minilora.lock").exists()
    reached = sorted_checkpoints(output_dir)[0]
    third = start([*RESUME, str(output_dir)])
    wait_until(third, lambda: sorted_checkpoints(output_dir)[0] != reached)
    third.send_signal(signal.SIGTERM)
    _, said = third.communicate(timeout=100)
    assert third.returncode == 143 and os.path.isdir(output_dir), said
