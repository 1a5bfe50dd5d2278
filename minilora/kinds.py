"""What a directory is, told from the files in it. Opens nothing."""

from pathlib import Path

from minilora.bert.weights import WEIGHT_FILES
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import CONFIG_NAME
from minilora.training.checkpoint import CHECKPOINT, is_trainer_checkpoint, sorted_checkpoints
from minilora.training.manifest import MANIFEST_NAME
from minilora.training.run import RUN_NAME

RUN = "run"
CHECKPOINT_OF_OURS = "checkpoint"
CHECKPOINT_OF_TRAINER = "checkpoint of HF Trainer"
INCOMPLETE = "incomplete checkpoint"
ADAPTER = "adapter"
MODEL = "model"

WHAT = {
    RUN: "a run of minilora.train",
    CHECKPOINT_OF_OURS: "a checkpoint of minilora.train",
    CHECKPOINT_OF_TRAINER: "a checkpoint that HF Trainer wrote",
    INCOMPLETE: "an incomplete checkpoint",
    ADAPTER: "a PEFT adapter",
    MODEL: "a model: a base, or one with its adapter merged",
}


def kind_of(path: Path) -> str:
    """Which of the kinds above the directory `path` is.

    Raises:
        MiniloraError: no directory, or none of the known kinds; says what was looked for.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise MiniloraError(f"{path} is {found}: give a directory that train or PEFT wrote")
    if (path / MANIFEST_NAME).is_file():
        return CHECKPOINT_OF_OURS
    if (path / RUN_NAME).is_file():
        return RUN
    if is_trainer_checkpoint(path):
        return CHECKPOINT_OF_TRAINER
    if CHECKPOINT.fullmatch(path.resolve().name):
        return INCOMPLETE
    if (path / CONFIG_NAME).is_file():
        return ADAPTER
    if (path / "config.json").is_file() and any((path / name).is_file() for name in WEIGHT_FILES):
        return MODEL
    within = [checkpoint.name for checkpoint in sorted_checkpoints(path)[:1]]
    raise MiniloraError(
        f"{path} is none of the known kinds: looked for {RUN_NAME} (a run), {MANIFEST_NAME} (its "
        f"checkpoint), training_args.bin (HF Trainer's), {CONFIG_NAME} (a PEFT adapter) and "
        f"config.json with weights (a model)"
        + (f"; it holds {within[0]}, which can be given itself" if within else "")
    )
