"""A resume you can prove: kill a run, resume it, compare every number and every tensor with one
that was left alone.

    python examples/prove_a_resume.py            on the packaged model and sentences, about a minute
    python examples/prove_a_resume.py --model_name_or_path M --train_file F

Three processes: one trains undisturbed; one is killed (SIGKILL, which no program can catch) as soon
as it has written a checkpoint; one is told nothing but the killed one's directory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

STEPS = 12


def train(*flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "minilora.train", *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    flags = [
        *sys.argv[1:], "--max_steps", str(STEPS), "--logging_steps", "1",
        "--save_strategy", "steps",
        "--save_steps", "1", "--eval_strategy", "no",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        whole, killed = Path(directory, "whole"), Path(directory, "killed")
        assert train(*flags, "--output_dir", str(whole)).wait() == 0

        process = train(*flags, "--output_dir", str(killed))
        while not list(killed.glob(f"checkpoint-{STEPS // 2}")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
        reached = max(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
        print(f"killed; its last complete checkpoint is of step {reached} of {STEPS}")

        assert train("--resume_from_checkpoint", str(killed)).wait() == 0
        name = "adapter_model.safetensors"
        one, other = load_file(whole / name), load_file(killed / name)
        same_tensors = all((one[key] == other[key]).all() for key in one)
        same_losses = losses(whole) == losses(killed)
        print(f"{len(losses(whole))} losses equal, bit for bit: {same_losses}")
        print(f"{len(one)} tensors equal, bit for bit: {same_tensors}")
        raise SystemExit(0 if same_losses and same_tensors else 1)


if __name__ == "__main__":
    main()
