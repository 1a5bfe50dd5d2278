"""Every task's run, killed at a random moment and resumed, is the run that was left alone.

The moment is another each time, and a failure says which: while a checkpoint is being written, or
at any other time. A process is stopped before it is killed, so that it is known which it was.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minilora.files import LEFTOVER
from minilora.training.checkpoint import sorted_checkpoints
from minilora.training.config import TASKS
from tests.cells import arguments, base_of, files_of
from tests.faults.test_command import RESUME, assert_same_run, wait_until
from tests.forked import run_forked
from tests.training.test_resume import command

STEPS = 14  # nearly five epochs


def in_a_save(output_dir: Path) -> bool:
    return any(LEFTOVER.fullmatch(path.name) for path in output_dir.iterdir())


def kill(process: subprocess.Popen, output_dir: Path, step: int, saves: bool) -> None:
    """SIGKILL once the checkpoint of `step` is there, and while a save is going on, or is not."""
    wait_until(process, (output_dir / f"checkpoint-{step}").is_dir)
    while True:
        time.sleep(random.uniform(0, 0.01))
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert process.poll() is None, "the run ended before it could be killed"
        if in_a_save(output_dir) == saves:
            break
        process.send_signal(signal.SIGCONT)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("task", "saves"), [*zip(TASKS, [True, False] * 3, strict=True)])
def test_a_task_killed_at_a_random_moment_resumes_to_the_same_bits(
    task, saves, tmp_path, tiny_model
):
    base = base_of("bert", "bare", AutoTokenizer.from_pretrained(tiny_model), tmp_path / "base")
    files, killed, whole = files_of(task, tmp_path), tmp_path / "killed", tmp_path / "whole"
    often = {"max_steps": STEPS, "save_steps": 1, "eval_steps": 10, "save_total_limit": STEPS}
    _, _, _, *flags = command(arguments(task, base, files, whole, **often))
    assert run_forked("train", *flags, seconds=100).code == 0

    values = arguments(task, base, files, killed, **often)
    process = subprocess.Popen(
        command(values), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    step = random.randrange(1, STEPS // 2)
    kill(process, killed, step, saves)
    reached = int(sorted_checkpoints(killed)[0].name.rpartition("-")[2])
    print(f"killed with checkpoint-{reached} there")
    assert step <= reached < STEPS and not (killed / "adapter_config.json").exists()
    subprocess.run([*RESUME, str(killed)], check=True, capture_output=True)
    assert_same_run(killed, whole)
