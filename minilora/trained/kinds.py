"""What a directory is, told from the files in it. Opens nothing."""

from pathlib import Path

from minilora.bert.weights import WEIGHT_FILES
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import CONFIG_NAME
from minilora.training.checkpoint import CHECKPOINT, is_trainer_checkpoint, sorted_checkpoints
from minilora.training.manifest import MANIFEST_NAME
from minilora.training.run import RUN_NAME
from minilora.training.trainer_files import STATE_NAME

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
    named = CHECKPOINT.fullmatch(path.resolve().name) is not None
    is_adapter = (path / CONFIG_NAME).is_file()
    # A directory that Trainer's save_model wrote has training_args.bin, too, and is no checkpoint.
    if is_adapter and is_trainer_checkpoint(path) and (named or (path / STATE_NAME).is_file()):
        return CHECKPOINT_OF_TRAINER
    has_weights = any((path / name).is_file() for name in WEIGHT_FILES)
    if has_weights and (path / "config.json").is_file() and not is_adapter:
        return MODEL
    if named:
        return INCOMPLETE
    if is_adapter:
        return ADAPTER
    within = [checkpoint.name for checkpoint in sorted_checkpoints(path)[:1]]
    raise MiniloraError(
        f"{path} is none of the known kinds: looked for {RUN_NAME} (a run), {MANIFEST_NAME} (its "
        f"checkpoint), {CONFIG_NAME} (a PEFT adapter; with training_args.bin and {STATE_NAME}, a "
        "checkpoint of HF Trainer's) and config.json with weights (a model)"
        + (f"; it holds {within[0]}, which can be given itself" if within else "")
    )
