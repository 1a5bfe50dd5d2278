"""On a GPU, with hf_parity: the bits of HF Trainer + PEFT there, and each other's checkpoints."""

import shutil

import pytest
from safetensors.torch import load_file

from minilora.fine_tuning import run_fine_tuning
from tests.cuda import needs_cuda
from tests.training.test_trainer_parity import (
    EACH_STEP,
    LORA,
    assert_same_tensors,
    clone,
    compared,
    flags_to_resume,
    ours,
    peft_tensors,
    trainer,
)

pytestmark = needs_cuda

STEPS = 12
THERE, HERE = {"use_cpu": False}, {"device": "cuda"}


def cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


RUNS = {
    "default": {},
    "evaluation each epoch": {"eval_strategy": "epoch"},
    "accumulation": {"gradient_accumulation_steps": 4, "num_train_epochs": 3},
    "weight decay, cosine": {"weight_decay": 0.1, "lr_scheduler_type": "cosine"},
    "smoothed labels": {"label_smoothing_factor": 0.2, "eval_strategy": "epoch"},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_every_number_of_a_run_is_trainers(settings, tmp_path, tiny_model, sentences):
    theirs = trainer(tiny_model, sentences, tmp_path / "theirs", {**THERE, **settings})
    theirs.train()
    assert theirs.model.device.type == "cuda"
    result = ours(tiny_model, sentences, tmp_path / "ours", {**HERE, **settings})
    expected = compared(theirs.state.log_history)
    assert expected and compared(result.log_history) == expected
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert_same_tensors(cpu(peft_tensors(theirs.model)), found)


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": "all-linear"}, {"use_dora": True}, {"bias": "all"}],
    ids=str,
)
def test_every_number_is_trainers_for_other_adapters(lora, tmp_path, tiny_model, sentences):
    lora = {**LORA, **lora}
    theirs = trainer(tiny_model, sentences, tmp_path / "theirs", dict(THERE), lora)
    theirs.train()
    result = ours(tiny_model, sentences, tmp_path / "ours", HERE, lora)
    assert compared(result.log_history) == compared(theirs.state.log_history)


def test_the_gpus_run_is_not_the_cpus(tmp_path, tiny_model, sentences):
    """Negative control."""
    theirs = trainer(tiny_model, sentences, tmp_path / "theirs", dict(THERE))
    theirs.train()
    result = ours(tiny_model, sentences, tmp_path / "ours", {"device": "cpu"})
    assert compared(result.log_history) != compared(theirs.state.log_history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, sentences):
    """One uninterrupted run of Trainer's: (directory, rows, tensors)."""
    output_dir = tmp_path_factory.mktemp("trainer") / "whole"
    run = trainer(tiny_model, sentences, output_dir, {**EACH_STEP, **THERE})
    run.train()
    return output_dir, compared(run.state.log_history), clone(cpu(peft_tensors(run.model)))


@pytest.mark.parametrize("step", [1, 6, 8])
def test_trainer_continues_our_checkpoint_bitwise(step, tmp_path, tiny_model, sentences, whole):
    ours(tiny_model, sentences, tmp_path / "ours", {**EACH_STEP, **HERE}, stop_after=step)
    run = trainer(tiny_model, sentences, tmp_path / "out", dict(THERE))
    run.train(resume_from_checkpoint=str(tmp_path / "ours" / f"checkpoint-{step}"))
    assert compared(run.state.log_history) == whole[1]
    assert_same_tensors(whole[2], cpu(peft_tensors(run.model)))


@pytest.mark.parametrize("step", [1, 6, 8])
def test_we_continue_trainers_checkpoint_bitwise(step, tmp_path, tiny_model, sentences, whole):
    checkpoint = tmp_path / "out" / f"checkpoint-{step}"
    shutil.copytree(whole[0] / f"checkpoint-{step}", checkpoint)
    flags = flags_to_resume(tiny_model, sentences, checkpoint, HERE)
    result = run_fine_tuning(flags, {}, lambda: False)
    assert compared(result.log_history) == whole[1]
    assert_same_tensors(whole[2], load_file(checkpoint.parent / "adapter_model.safetensors"))
