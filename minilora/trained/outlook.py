"""What `--resume_from_checkpoint` would do with a directory, found out without doing it."""

from pathlib import Path
from typing import Any

from minilora.bert import packaged, weights
from minilora.bert.data import file_fingerprint
from minilora.durable import is_held
from minilora.errors import MiniloraError
from minilora.training.checkpoint import is_trainer_checkpoint, sorted_checkpoints
from minilora.training.config import TrainConfig, train_config_from_dict
from minilora.training.manifest import environment, verify
from minilora.training.resume import EXACTNESS
from minilora.training.run import ResumePoint, find_resume_point, is_resumable
from minilora.training.trainer_files import missing_parts, read_progress, recorded_arguments

PACKAGED_FILES = {"train": packaged.TRAIN_FILE, "validation": packaged.VALIDATION_FILE}


def resume_outlook(path: Path) -> dict[str, Any]:
    """What resuming from `path`, a run's directory or a checkpoint, would do.

    Returns:
        checkpoint (where it would go on; None is step 0), step, max_steps, refuses (every reason
        found why it would be refused; empty if none), remarks (what else it would say or do).
        The base model is only looked for; its fingerprint is checked when a resume loads it.
    """
    outlook: dict[str, Any] = {"checkpoint": None, "step": 0, "max_steps": None}
    outlook |= {"refuses": [], "remarks": []}
    try:
        point = find_resume_point(path)
        if point.checkpoint is not None:
            progress = read_progress(point.checkpoint)
            outlook["checkpoint"] = str(point.checkpoint)
            outlook["step"], outlook["max_steps"] = progress["global_step"], progress["max_steps"]
        if is_held(point.output_dir):
            outlook["refuses"].append(f"{point.output_dir} is in use by another run")
        outlook["refuses"] += _refusals(point)
        outlook["remarks"] += _remarks(point)
    except MiniloraError as error:
        outlook["refuses"].append(str(error))
    if outlook["max_steps"] is not None and outlook["step"] >= outlook["max_steps"]:
        outlook["remarks"].append("finished: nothing is left to train")
    return outlook


def _refusals(point: ResumePoint) -> list[str]:
    found = []
    if point.checkpoint is not None and is_trainer_checkpoint(point.checkpoint):
        missing = missing_parts(point.checkpoint)
        if missing:
            found.append(f"{point.checkpoint} lacks {', '.join(missing)}")
    if point.run is None:
        return found
    if point.checkpoint is None and "result" in point.run:
        found.append(f"{point.output_dir} is finished and kept no checkpoint")
    try:
        config = train_config_from_dict(point.run["arguments"], str(point.output_dir))
        weights.locate(config.model_name_or_path)
    except MiniloraError as error:
        return [*found, str(error)]
    return found + _changed_files(config, point.run["data_sha256"])


def _changed_files(config: TrainConfig, recorded: dict[str, str]) -> list[str]:
    found = []
    for part, digest in recorded.items():
        named = getattr(config, f"{part}_file")
        if named is None and part == "validation" and config.validation_split > 0:
            named = config.train_file
        file = Path(named) if named is not None else PACKAGED_FILES[part]
        if not file.is_file():
            found.append(f"the {part} file {file} is gone (give --{part}_file if it has moved)")
        elif file_fingerprint(file) != digest:
            found.append(f"the {part} file {file} has changed")
    return found


def _remarks(point: ResumePoint) -> list[str]:
    found = []
    for checkpoint in sorted_checkpoints(point.output_dir):
        if checkpoint == point.checkpoint:
            break
        reason = "superseded" if is_resumable(checkpoint) else "invalid"
        found.append(f"{checkpoint.name} would be set aside as .{reason}-...")
    if point.checkpoint is None:
        return [*found, "no checkpoint yet: the run would start at step 0"]
    if is_trainer_checkpoint(point.checkpoint):
        told = ", ".join(f"{k} {v}" for k, v in recorded_arguments(point.checkpoint).items())
        return [*found, f"Trainer's files tell {told}; the data and the base model are to be given"]
    recorded, here = verify(point.checkpoint).environment, environment()
    for name in EXACTNESS:
        if recorded.get(name) != here[name]:
            found.append(
                f"{name} was {recorded.get(name)} and is {here[name]}: may not be bit-exact"
            )
    return found
