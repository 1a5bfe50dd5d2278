"""The whole command in a fork: `python -m tests.faults.command MODEL TRAIN_FILE VALIDATION`."""

import sys
from functools import partial
from pathlib import Path

from minilora import MiniloraError, train
from minilora.training.resume import plan_resume
from minilora.training.run_directory import advice_on_disk_errors
from tests.faults.forks import serve


def fresh_flags(model, train_file, validation_file, output_dir) -> list[str]:
    """A short run of four steps: four checkpoints, of which two stay, and two evaluations."""
    return [
        "--model_name_or_path", str(model), "--train_file", str(train_file), "--validation_file",
        str(validation_file), "--output_dir", str(output_dir), "--max_steps", "4",
        "--per_device_train_batch_size", "8", "--logging_steps", "1", "--save_strategy", "steps",
        "--save_steps", "1", "--save_total_limit", "2", "--eval_strategy", "steps", "--eval_steps",
        "2", "--device", "cpu",
    ]  # fmt: skip


def run(model: str, train_file: str, validation_file: str, output_dir: Path) -> int:
    """Go on, or start if there is nothing to go on from."""
    try:
        with advice_on_disk_errors(output_dir):
            plan_resume(output_dir)
        flags = ["--resume_from_checkpoint", str(output_dir)]
    except MiniloraError:
        flags = fresh_flags(model, train_file, validation_file, output_dir)
    sys.argv = ["minilora.train", *flags]
    return train.main()


if __name__ == "__main__":
    serve(partial(run, *sys.argv[1:]))
