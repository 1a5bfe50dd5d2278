"""The same damage done to HF Trainer's checkpoint and resumed by HF Trainer: what `docs/faults.md`
says of it, measured.

With an intact checkpoint its resume is exact, which makes the difference below the damage's.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, set_seed

from tests.conftest import tiny_config
from tests.training.test_trainer_parity import peft_tensors, trainer

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
STEPS = 6  # 44 sentences in batches of 8


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_model, sentences):
    """A directory with checkpoint-2 and checkpoint-4 of a run of six steps, and the tensors that
    an undisturbed run ends with.
    """
    directory = tmp_path_factory.mktemp("trainer")
    whole = trainer(tiny_model, sentences, directory / "whole", dict(SETTINGS))
    whole.train()
    trainer(tiny_model, sentences, directory / "run", dict(SETTINGS), stop_after=4).train()
    return directory / "run", {k: t.clone() for k, t in peft_tensors(whole.model).items()}


def nothing(checkpoint: Path) -> None:
    pass


def remove(name: str):
    return lambda checkpoint: (checkpoint / name).unlink()


def cut_short(name: str):
    return lambda checkpoint: (checkpoint / name).write_bytes(b"")


def remove_everything(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40  # of the last float's exponent
    file.write_bytes(data)


def drop_a_tensor(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[min(name for name in tensors if "lora_A" in name)]
    save_file(tensors, file, metadata={"format": "pt"})


def resumed(stopped, tmp_path, damage, model, sentences) -> bool:
    """Whether HF Trainer, resuming, ends with the tensors of the undisturbed run."""
    directory, expected = stopped
    run = shutil.copytree(directory, tmp_path / "run")
    damage(run / "checkpoint-4")
    again = trainer(model, sentences, run, dict(SETTINGS))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    found = peft_tensors(again.model)
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_intact_checkpoint_resumes_exactly(stopped, tmp_path, tiny_model, sentences):
    """Negative control."""
    assert resumed(stopped, tmp_path, nothing, tiny_model, sentences)


SILENT = {
    "optimizer.pt missing": remove("optimizer.pt"),
    "scheduler.pt missing": remove("scheduler.pt"),
    "rng_state.pth missing": remove("rng_state.pth"),
    "one bit of the adapter flipped": flip_a_bit,
    "one LoRA tensor missing": drop_a_tensor,
}


@pytest.mark.parametrize("damage", SILENT)
def test_trainer_goes_on_as_another_run(damage, stopped, tmp_path, tiny_model, sentences):
    assert not resumed(stopped, tmp_path, SILENT[damage], tiny_model, sentences)


def test_trainer_goes_on_with_another_base_model(stopped, tmp_path, tiny_model, sentences):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    set_seed(99)
    BertModel(tiny_config()).save_pretrained(other)
    assert not resumed(stopped, tmp_path, nothing, other, sentences)


FATAL = {
    "an empty directory": remove_everything,
    "trainer_state.json missing": remove("trainer_state.json"),
    "trainer_state.json empty": cut_short("trainer_state.json"),
    "optimizer.pt empty": cut_short("optimizer.pt"),
    "the adapter missing": remove("adapter_model.safetensors"),
}


@pytest.mark.parametrize("damage", FATAL)
def test_trainer_stops_although_an_older_checkpoint_is_whole(
    damage, stopped, tmp_path, tiny_model, sentences
):
    """What a kill in the midst of its saving leaves, before any repair by hand."""
    with pytest.raises(Exception):  # noqa: B017 - of half a dozen types
        resumed(stopped, tmp_path, FATAL[damage], tiny_model, sentences)
