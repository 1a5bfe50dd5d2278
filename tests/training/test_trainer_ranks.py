"""HF Trainer + PEFT under torchrun as the oracle: with hf_parity, two ranks' training is the same.

44 sentences are no multiple of two ranks' batches of 8: accelerate, and we after it, repeat the
first ones of an epoch's order to fill the last. With two ranks the sum of gradients has one order
only, so that the bits do not depend on how torch cuts them into buckets.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from minilora.lora.peft_files import WEIGHTS_NAME
from minilora.reading import parse_torch
from minilora.training.trainer_files import NUMPY_GLOBALS
from tests.conftest import read_rows
from tests.ranks import run_ranks
from tests.training.test_trainer_parity import (
    EACH_STEP,
    LORA,
    assert_same_tensors,
    compared,
    our_arguments,
    peft_tensors,
    trainer,
)

pytestmark = pytest.mark.slow
WORLD = 2


def train_with_trainer(model, train_file, validation_file, output_dir, settings, checkpoint):
    """Trainer's run, as one of the ranks; the first leaves its log and its tensors."""
    files = (Path(train_file), Path(validation_file))
    run = trainer(model, files, output_dir, {"ddp_backend": "gloo", **json.loads(settings)})
    run.train(resume_from_checkpoint=checkpoint)
    if run.is_world_process_zero():
        Path(output_dir).mkdir(exist_ok=True)
        Path(output_dir, "log.json").write_text(json.dumps(run.state.log_history))
        save_file(
            {name: t.contiguous() for name, t in peft_tensors(run.model).items()},
            Path(output_dir, "tensors"),
        )
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads do not always end where its other process has ended


def trainers(model, sentences, output_dir, settings, checkpoint=None):
    """(rows, tensors) of a run of Trainer's by two ranks."""

    def train():
        for state in (AcceleratorState, PartialState):  # of the tests that one process ran before
            state._reset_state()
        GradientState._reset_state()
        return train_with_trainer(model, *sentences, output_dir, json.dumps(settings), checkpoint)

    finished = run_ranks(WORLD, train, seconds=200)
    assert [one.code for one in finished] == [0] * WORLD, finished[0].err + finished[-1].err
    rows = json.loads((output_dir / "log.json").read_text())
    return compared(rows), load_file(output_dir / "tensors")


def flags_of(arguments):
    return [word for name, value in arguments.items() for word in (f"--{name}", value)]


def ours(model, sentences, output_dir, settings, lora=LORA):
    arguments = {**our_arguments(model, sentences, settings), "output_dir": output_dir, **lora}
    return finished_run(output_dir, flags_of(arguments))


def finished_run(output_dir, flags):
    """(rows, tensors) of ours by two ranks."""
    finished = run_ranks(WORLD, "train", *flags, seconds=100)
    assert [one.code for one in finished] == [0] * WORLD, finished[0].err + finished[-1].err
    return compared(read_rows(output_dir)), load_file(output_dir / WEIGHTS_NAME)


RUNS = {
    "a ragged end": {},
    "data_seed and three epochs": {"data_seed": 11, "num_train_epochs": 3},
    "smoothed labels": {"label_smoothing_factor": 0.2},
    "tight clipping and weight decay": {"max_grad_norm": 0.01, "weight_decay": 0.1},
    "fewer examples than a step has": {"per_device_train_batch_size": 32, "max_steps": 4},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_every_number_of_two_ranks_is_trainers(settings, tmp_path, tiny_model, sentences):
    rows, tensors = trainers(tiny_model, sentences, tmp_path / "theirs", settings)
    our_rows, our_tensors = ours(tiny_model, sentences, tmp_path / "ours", settings)
    assert rows and our_rows == rows
    assert_same_tensors(tensors, our_tensors)


@pytest.mark.parametrize(
    "settings", [{"gradient_accumulation_steps": 2}, {"logging_steps": 3}], ids=str
)
def test_means_of_several_batches_differ_in_their_last_bit(
    settings, tmp_path, tiny_model, sentences
):
    """Trainer rounds each rank's sum to float32 before it adds them up; all else is the same."""
    rows, tensors = trainers(tiny_model, sentences, tmp_path / "theirs", settings)
    our_rows, our_tensors = ours(tiny_model, sentences, tmp_path / "ours", settings)
    assert_same_tensors(tensors, our_tensors)
    for row, our_row in zip(rows, our_rows, strict=True):
        assert our_row.pop("loss") == pytest.approx(row.pop("loss"), rel=3e-7)
        assert our_row == row


def test_an_evaluation_is_that_of_one_process_and_changes_no_training(
    tmp_path, tiny_model, sentences
):
    """Trainer's eval_loss grows with the ranks: 20 sentences are two batches of 5 for each."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 5}
    rows, tensors = trainers(tiny_model, sentences, tmp_path / "theirs", settings)
    our_rows, our_tensors = ours(tiny_model, sentences, tmp_path / "ours", settings)
    assert_same_tensors(tensors, our_tensors)
    for row in our_rows:
        if "eval_loss" in row:
            row["eval_loss"] *= WORLD
    assert our_rows == rows


def test_without_parity_two_ranks_run_another(tmp_path, tiny_model, sentences):
    """Negative control."""
    rows, _ = trainers(tiny_model, sentences, tmp_path / "theirs", {})
    our_rows, _ = ours(tiny_model, sentences, tmp_path / "ours", {"hf_parity": False})
    assert len(our_rows) == len(rows) and our_rows != rows


# Interchange: 2 epochs of 3 steps.
STEPS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, sentences):
    """Trainer's run with a checkpoint at each step: (directory, rows, tensors)."""
    output_dir = tmp_path_factory.mktemp("trainer") / "whole"
    return output_dir, *trainers(tiny_model, sentences, output_dir, EACH_STEP)


@pytest.fixture(scope="module")
def our_whole(tmp_path_factory, tiny_model, sentences):
    output_dir = tmp_path_factory.mktemp("minilora") / "whole"
    ours(tiny_model, sentences, output_dir, EACH_STEP)
    return output_dir


def resume_trainers(checkpoint, model, sentences):
    flags = our_arguments(model, sentences, {"resume_from_checkpoint": checkpoint})
    flags.pop("num_train_epochs")
    return flags_of(flags)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_trainer_continues_our_checkpoint_of_two_ranks(
    step, tmp_path, tiny_model, sentences, whole, our_whole
):
    checkpoint = str(our_whole / f"checkpoint-{step}")
    rows, tensors = trainers(tiny_model, sentences, tmp_path / "out", {}, checkpoint)
    assert rows == whole[1]
    assert_same_tensors(whole[2], tensors)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_we_continue_trainers_checkpoint_of_two_ranks(step, tmp_path, tiny_model, sentences, whole):
    checkpoint = tmp_path / "out" / f"checkpoint-{step}"
    shutil.copytree(whole[0] / f"checkpoint-{step}", checkpoint)
    assert {path.name for path in checkpoint.glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    flags = resume_trainers(checkpoint, tiny_model, sentences)
    rows, tensors = finished_run(tmp_path / "out", flags)
    assert rows == whole[1]
    assert_same_tensors(whole[2], tensors)


def test_the_other_ranks_generators_make_another_run(tmp_path, tiny_model, sentences, whole):
    """Negative control."""
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(whole[0] / "checkpoint-2", checkpoint)
    for rank in range(WORLD):
        name = f"rng_state_{rank}.pth"
        shutil.copy(whole[0] / "checkpoint-2" / name, checkpoint / f"rng_state_{1 - rank}.pth")
    rows, _ = finished_run(tmp_path / "out", resume_trainers(checkpoint, tiny_model, sentences))
    assert len(rows) == len(whole[1]) and rows != whole[1]


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_another_number_of_processes_is_refused(
    whose, tmp_path, tiny_model, sentences, whole, our_whole, command
):
    """Their steps would be of other examples."""
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree((whole[0] if whose == "theirs" else our_whole) / "checkpoint-2", checkpoint)
    flags = resume_trainers(checkpoint, tiny_model, sentences)
    finished = command("train", *(flags if whose == "theirs" else flags[-2:]))
    assert finished.code == 2
    assert ("is epoch" if whose == "theirs" else "must be as many") in finished.err


def test_the_same_where_torchrun_starts_both(tmp_path, tiny_model, sentences):
    settings = {"save_strategy": "steps", "save_steps": 4}
    arguments = our_arguments(tiny_model, sentences, settings) | LORA
    arguments["lora_r"] = arguments.pop("r")  # torchrun takes --r for a flag of its own
    arguments["output_dir"] = tmp_path / "ours"
    theirs = [tiny_model, *sentences, tmp_path / "theirs", json.dumps(settings)]
    commands = {"tests.training.test_trainer_ranks": theirs, "minilora.train": flags_of(arguments)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for module, flags in commands.items():
        command = [*start, "--nproc_per_node", WORLD, "-m", module, *flags]
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "theirs" / "log.json").read_text())
    assert compared(read_rows(tmp_path / "ours")) == compared(rows)
    our_tensors = load_file(tmp_path / "ours" / WEIGHTS_NAME)
    assert_same_tensors(load_file(tmp_path / "theirs" / "tensors"), our_tensors)
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        paths = [tmp_path / place / "checkpoint-4" / name for place in ("theirs", "ours")]
        found = [parse_torch(path.read_bytes(), path, NUMPY_GLOBALS)["cpu"] for path in paths]
        assert torch.equal(*found)


if __name__ == "__main__":
    train_with_trainer(*sys.argv[1:], checkpoint=None)
