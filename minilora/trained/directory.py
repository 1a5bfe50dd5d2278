"""A directory: what it is, what is in it, what a resume would do with it. Read, never changed.

Nothing in it is run, and no model is built: of a base model only its file's header is looked at.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.bert.load import WEIGHT_FILES, locate
from minilora.bert.splits import file_fingerprint
from minilora.bert.stored import parameter_count, stored_tensors
from minilora.errors import MiniloraError
from minilora.files import is_held
from minilora.lora.config import config_to_dict
from minilora.lora.peft_files import CONFIG_NAME, read_adapter
from minilora.reading import parse_json, read_bytes, read_json
from minilora.training.checkpoint import (
    CHECKPOINT,
    Stored,
    is_trainer_checkpoint,
    read_checkpoint,
    sorted_checkpoints,
)
from minilora.training.record import MANIFEST_NAME, RunRecord
from minilora.training.resume import changed_inputs, plan_resume
from minilora.training.run_directory import METRICS_NAME, RUN_NAME, read_run
from minilora.training.trainer_files import (
    MAX_STATE_BYTES,
    STATE_NAME,
    check_progress,
    recorded_arguments,
)

# The kinds of directories.
WHAT = {
    "run": "a run of minilora.train",
    "checkpoint": "a checkpoint of minilora.train",
    "checkpoint of HF Trainer": "a checkpoint that HF Trainer wrote",
    "incomplete checkpoint": "an incomplete checkpoint",
    "adapter": "a PEFT adapter",
    "model": "a model: a base, or one with its adapter merged",
}


class Directory:
    """What is in a directory, each file read once."""

    def __init__(self, path: Path) -> None:
        """Tell what it is; what is in it, `read` finds out."""
        self.path, self.kind = path, kind_of(path)
        self.checkpoint: Stored | None = None
        self.settings: dict[str, Any] = {}
        """What records the run, as JSON; of HF Trainer's, the arguments that its files tell."""
        self.progress: dict[str, Any] | None = None
        """The contents of trainer_state.json."""
        self.log: list[dict[str, Any]] = []
        self.config: dict[str, Any] | None = None
        """The adapter's, or the model's."""
        self.tensors: dict[str, Tensor] = {}
        """The same."""

    def read(self, checkpoint: Stored | None = None) -> "Directory":
        """Read it all. Before a file that is damaged, what was read so far stays.

        Args:
            checkpoint: what `read_checkpoint` returned, where it has been read already.
        """
        path, state_file, metrics = self.path, self.path / STATE_NAME, self.path / METRICS_NAME
        if self.kind == "run":
            self.settings = read_run(path).to_json()
            lines = read_bytes(metrics).splitlines() if metrics.is_file() else []
            self.log = [parse_json(line, metrics) for line in lines]
        elif "checkpoint" in self.kind:
            self.checkpoint = checkpoint or read_checkpoint(path)
            self.settings, self.progress = _settings(self.checkpoint), self.checkpoint.progress
        elif state_file.is_file():
            progress = read_json(state_file, MAX_STATE_BYTES)
            check_progress(progress, state_file)
            self.progress = progress
        if self.progress is not None:
            self.log = self.progress["log_history"]
        if self.kind == "model":  # whose config may list very many labels
            self.config = read_json(path / "config.json", limit=50_000_000)
            self.tensors = dict(stored_tensors(str(path)))
        elif (path / CONFIG_NAME).is_file():
            adapter = self.checkpoint.adapter if self.checkpoint else read_adapter(path)
            self.config = config_to_dict(adapter.config)
            self.tensors = dict(sorted(adapter.tensors.items()))
        return self


def kind_of(path: Path) -> str:
    """Which of the kinds above the directory `path` is. Opens nothing."""
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise MiniloraError(f"{path} is {found}: give a directory that train or PEFT wrote")
    files = {entry.name for entry in path.iterdir() if entry.is_file()}
    is_named = CHECKPOINT.fullmatch(path.resolve().name) is not None
    is_adapter = CONFIG_NAME in files
    # A directory that Trainer's save_model wrote has training_args.bin, too, and is no checkpoint.
    is_trainers = is_trainer_checkpoint(path) and (is_named or STATE_NAME in files)
    kinds = {
        "checkpoint": MANIFEST_NAME in files,
        "run": RUN_NAME in files,
        "checkpoint of HF Trainer": is_adapter and is_trainers,
        "model": not is_adapter and "config.json" in files and not files.isdisjoint(WEIGHT_FILES),
        "incomplete checkpoint": is_named,
        "adapter": is_adapter,
    }
    for kind, is_it in kinds.items():
        if is_it:
            return kind
    within = sorted_checkpoints(path)
    raise MiniloraError(
        f"{path} is none of the known kinds: looked for {RUN_NAME} (a run), {MANIFEST_NAME} (its "
        f"checkpoint), {CONFIG_NAME} (a PEFT adapter) and config.json with weights (a model)"
        + (f"; it holds {within[0].name}, which can be given itself" if within else "")
    )


def inspect_directory(path: str | Path) -> dict[str, Any]:
    """What `path` is and holds, as plain data; None stands for what such a directory has not.

    Returns:
        kind, what (the kind in words), problems (why it does not verify: what is damaged is not
        described further), verified (True where every hash was checked), position (step, epoch,
        ...), config (the adapter's or the model's), arguments, labels, result (the run's), tensors
        (name, shape, dtype and norm of each; None for a norm that is not finite), trainable
        (parameters, of, percent), log (rows, last), resume (checkpoint, step, max_steps: where it
        would go on; refuses: every reason found against it; remarks: what else it would say or do).
    """
    path = Path(path)
    directory, problems = Directory(path), []
    known, resume = _resume(directory)
    is_read = known is not None and known.path == path.resolve()
    try:
        directory.read(known if is_read else None)
    except MiniloraError as error:
        problems.append(str(error))
    tensors = [_described(name, tensor) for name, tensor in directory.tensors.items()]
    broken = [tensor["name"] for tensor in tensors if tensor["norm"] is None]
    problems += [f"{path}: {name} holds NaN or infinity" for name in broken]
    verified = _verify(directory, known, problems)
    settings, log = directory.settings, directory.log
    return {
        "path": str(path),
        "kind": directory.kind,
        "what": WHAT[directory.kind],
        "problems": problems,
        "verified": verified,
        "position": _position(directory),
        "config": directory.config,
        **{name: settings.get(name) for name in ("arguments", "labels", "result")},
        "tensors": tensors,
        "trainable": _trainable(directory),
        "log": {"rows": len(log), "last": log[-1] if log else None},
        "resume": resume,
    }


def _settings(stored: Stored) -> dict[str, Any]:
    if stored.manifest is not None:
        return {} if stored.manifest.record is None else stored.manifest.record.to_json()
    parts = (stored.progress, stored.optimizer, stored.generators)
    return {"arguments": recorded_arguments(*parts, stored.path)}


def _verify(directory: Directory, known: Stored | None, problems: list[str]) -> bool | None:
    """Whether every hash holds, of a run those of all its checkpoints; `known` has been read."""
    before, first = len(problems), directory.checkpoint or known
    whole = [] if first is None else [first]
    for path in sorted_checkpoints(directory.path) if directory.kind == "run" else []:
        try:
            if known is None or path.resolve() != known.path:
                whole.append(read_checkpoint(path))
        except MiniloraError as error:
            problems.append(str(error))
    lacks = {stored.path: stored.missing() for stored in whole if stored.missing()}
    problems += [f"{path} lacks {', '.join(names)}" for path, names in lacks.items()]
    is_hashed = directory.kind in ("run", "checkpoint") and len(whole) > 0
    return True if is_hashed and len(problems) == before else None


def _position(directory: Directory) -> dict[str, Any] | None:
    if directory.kind == "run" and directory.settings:
        names = [checkpoint.name for checkpoint in sorted_checkpoints(directory.path)]
        return {"finished": "result" in directory.settings, "checkpoints": names}
    progress, stored = directory.progress, directory.checkpoint
    if progress is None:
        return None
    state = stored.manifest.state if stored is not None and stored.manifest is not None else {}
    return {
        "step": progress["global_step"],
        "max_steps": progress["max_steps"],
        "epoch": progress["epoch"],
        **{name: state[name] for name in ("step_in_epoch", "inexact_from") if name in state},
    }


def _described(name: str, tensor: Tensor) -> dict[str, Any]:
    norm = tensor.double().norm().item()
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": norm if math.isfinite(norm) else None,  # JSON has no NaN
    }


def _trainable(directory: Directory) -> dict[str, Any] | None:
    if directory.kind == "model" or directory.config is None:
        return None
    trained = sum(tensor.numel() for tensor in directory.tensors.values())
    name = directory.config["base_model_name_or_path"]
    base = parameter_count(name) if name else None  # None, too, where it is not on this machine
    total = base and trained + base
    return {"parameters": trained, "of": total, "percent": total and 100 * trained / total}


def _resume(directory: Directory) -> tuple[Stored | None, dict[str, Any] | None]:
    """The checkpoint that a resume would go on from, and what it would do. The base model is only
    looked for: its fingerprint is checked when a resume loads it.
    """
    if directory.kind in ("adapter", "model"):
        return None, None
    found: dict[str, Any] = {"checkpoint": None, "step": 0, "max_steps": None}
    try:
        plan = plan_resume(directory.path)
    except MiniloraError as error:
        return None, {**found, "refuses": [str(error)], "remarks": []}
    refuses, stored, record = list(plan.refusals), plan.stored, plan.record
    if is_held(plan.output_dir):
        refuses.append(f"{plan.output_dir} is in use by another run")
    remarks = [f"{path.name} would be set aside as .{why}-..." for path, why in plan.set_aside]
    remarks += plan.warnings
    if record is not None:
        refuses += _unusable_inputs(record)
    elif stored is not None and stored.manifest is None:
        arguments = _settings(stored)["arguments"]
        told = ", ".join(f"{name} {value}" for name, value in arguments.items())
        remarks.append(f"Trainer's files tell {told}; the data and the base model are to be given")
    if stored is None:
        remarks.append("no checkpoint yet: the run would start at step 0")
    else:
        step, max_steps = stored.progress["global_step"], stored.progress["max_steps"]
        found = {"checkpoint": str(stored.path), "step": step, "max_steps": max_steps}
        if step >= max_steps:
            remarks.append("finished: nothing is left to train")
    return stored, {**found, "refuses": refuses, "remarks": remarks}


def _unusable_inputs(record: RunRecord) -> list[str]:
    found, now = [], dict(record.data_sha256)
    for split in record.data_sha256:
        file = getattr(record.arguments, f"{split}_file")
        if file is not None and Path(file).is_file():
            now[split] = file_fingerprint(Path(file))
        elif file is not None:
            found.append(f"the {split} file {file} is gone (give --{split}_file if it has moved)")
    found += [f"the {changed} has changed" for changed in changed_inputs(record, now)]
    try:
        locate(record.arguments.model_name_or_path, record.arguments.model_revision)
    except MiniloraError as error:
        found.append(str(error))
    return found
