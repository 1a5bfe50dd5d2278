"""What a directory is, what is in it, and what a resume would do with it. Nothing in it is changed
or run, and no model is built.
"""

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.bert.load import WEIGHT_FILES, locate, stored_tensors
from minilora.bert.tables import file_fingerprint
from minilora.errors import MiniloraError
from minilora.files import is_held
from minilora.lora.config import config_to_dict
from minilora.lora.peft_files import CONFIG_NAME, read_adapter
from minilora.reading import read_json
from minilora.training import checkpoint, trainer_files
from minilora.training.checkpoint import Stored, read_checkpoint, sorted_checkpoints
from minilora.training.metrics_file import METRICS_NAME, parse_rows, read_rows
from minilora.training.record import BASE_NAME, CHECKPOINT, MANIFEST_NAME, RUN_NAME, RunRecord
from minilora.training.resume import changed_inputs, plan_resume
from minilora.training.trainer_files import STATE_NAME


class Directory:
    """What is in a directory: the kind is told at once, the rest by `read`."""

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, kind_of(path)
        self.checkpoint: Stored | None = None
        self.settings: dict[str, Any] = {}  # the run's record; of Trainer's, what its files tell
        self.position: dict[str, Any] | None = None  # how far training has come
        self.log: list[dict[str, Any]] = []
        self.config: dict[str, Any] | None = None  # the adapter's, or the model's
        self.tensors: dict[str, Tensor] = {}  # the same

    def read(self) -> "Directory":
        """Read it all. What was read before a damaged file stays."""
        path, state_file = self.path, self.path / STATE_NAME
        if self.kind == "run":
            self.settings = RunRecord.read(path).to_json()
            names = [checkpoint.name for checkpoint in sorted_checkpoints(path)]
            self.position = {"finished": "result" in self.settings, "checkpoints": names}
            self.position |= {n: self.settings.get(n, []) for n in ("extended", "resumed")}
            self.log = read_rows(path)
        elif "checkpoint" in self.kind:
            stored = self.checkpoint = read_checkpoint(path)
            self._take_progress(stored.progress, stored.manifest and stored.manifest.state)
            if (whole := stored.metrics()) is not None:
                self.log = parse_rows(whole, path.parent / METRICS_NAME)
            if stored.record is not None:
                self.settings = stored.record.to_json()
            elif stored.manifest is None:
                told = trainer_files.recorded_arguments(stored.progress, stored.parts, path)
                self.settings = {"arguments": told}
        elif state_file.is_file():
            progress = read_json(state_file, trainer_files.MAX_STATE_BYTES)
            trainer_files.check_progress(progress, state_file)
            self._take_progress(progress, None)
        if self.kind == "model":  # whose config may list very many labels
            self.config = read_json(path / "config.json", limit=50_000_000)
            self.tensors = dict(stored_tensors(str(path)))
        elif (path / CONFIG_NAME).is_file():
            adapter = self.checkpoint.adapter if self.checkpoint else read_adapter(path)
            self.config = config_to_dict(adapter.config)
            self.tensors = dict(sorted(adapter.tensors.items()))
        return self

    def _take_progress(self, progress: dict[str, Any], state: dict[str, Any] | None) -> None:
        self.log = progress["log_history"]
        named = {"step": "global_step", "max_steps": "max_steps", "epoch": "epoch"}
        self.position = {name: progress[theirs] for name, theirs in named.items()}
        if state is not None:
            self.position |= {name: state[name] for name in ("step_in_epoch", "inexact_from")}


def kind_of(path: Path) -> str:
    """Which of the kinds below the directory is. Opens nothing."""
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise MiniloraError(f"{path} is {found}: give a directory that train or PEFT wrote")
    files = {entry.name for entry in path.iterdir() if entry.is_file()}
    is_named = CHECKPOINT.fullmatch(path.resolve().name) is not None
    is_adapter = CONFIG_NAME in files
    # A directory that Trainer's save_model wrote has training_args.bin, too, and is no checkpoint.
    is_trainers = checkpoint.is_trainer_checkpoint(path) and (is_named or STATE_NAME in files)
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
    looked_for = f"{RUN_NAME}, {MANIFEST_NAME}, {CONFIG_NAME}, or config.json with weights"
    within = sorted_checkpoints(path)
    holds = f"; it holds {within[0].name}" if within else ""
    raise MiniloraError(f"{path} is none of the known kinds: looked for {looked_for}{holds}")


def inspect_directory(path: str | Path) -> dict[str, Any]:
    """What `path` is and holds, as plain data; None stands for what such a directory has not.

    verified is True where every hash was checked; problems say why not, and what is damaged is not
    described further. A tensor's norm is None if not finite. resume says where it would go on;
    refuses has every reason found against it, remarks what else it would say or do.
    """
    directory, problems = Directory(Path(os.path.realpath(path))), []
    try:
        directory.read()
    except MiniloraError as error:
        problems.append(str(error))
    tensors = [_described(name, tensor) for name, tensor in directory.tensors.items()]
    broken = [tensor["name"] for tensor in tensors if tensor["norm"] is None]
    problems += [f"{path}: {name} holds NaN or infinity" for name in broken]
    verified = _verify(directory, problems)
    is_adapter = directory.kind != "model" and directory.config is not None
    return {
        "path": str(path),
        "kind": directory.kind,
        "problems": problems,
        "verified": verified,
        "position": directory.position,
        "config": directory.config,
        **{name: directory.settings.get(name) for name in ("arguments", "labels", "result")},
        "tensors": tensors,
        "trainable": _trainable(directory) if is_adapter else None,
        "log": {"rows": len(directory.log), "last": directory.log[-1] if directory.log else None},
        "resume": None if directory.kind in ("adapter", "model") else _resume(directory.path),
    }


def _verify(directory: Directory, problems: list[str]) -> bool | None:
    """Whether every hash holds, of a run those of all its checkpoints; if not, problems say why."""
    whole, before = [directory.checkpoint] if directory.checkpoint else [], len(problems)
    for path in sorted_checkpoints(directory.path) if directory.kind == "run" else []:
        try:
            whole.append(read_checkpoint(path))
        except MiniloraError as error:
            problems.append(str(error))
    problems += [f"{s.path} lacks {', '.join(s.missing())}" for s in whole if s.missing()]
    is_hashed = directory.kind in ("run", "checkpoint") and whole
    return True if is_hashed and len(problems) == before else None


def _described(name: str, tensor: Tensor) -> dict[str, Any]:
    norm = tensor.double().norm().item()
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": norm if math.isfinite(norm) else None,  # JSON has no NaN
    }


def _trainable(directory: Directory) -> dict[str, Any]:
    """What is trained, and `of` how much with all of the base, where its files are here."""
    trained = sum(tensor.numel() for tensor in directory.tensors.values())
    name, base = (directory.config or {}).get("base_model_name_or_path"), 0
    with contextlib.suppress(MiniloraError):
        weights = [tensor for _, tensor in stored_tensors(name, "meta")] if name else []
        base = sum(tensor.numel() for tensor in weights if tensor.is_floating_point())
    total = trained + base if base else None
    percent = total and round(100 * trained / total, 4)
    return {"parameters": trained, "of": total, "percent": percent}


def _resume(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"checkpoint": None, "step": 0, "max_steps": None}
    try:
        plan = plan_resume(path)
    except MiniloraError as error:
        return {**found, "refuses": [str(error)], "remarks": []}
    refuses, stored = list(plan.refusals), plan.stored
    if is_held(plan.output_dir):
        refuses.append(f"{plan.output_dir} is in use by another run")
    remarks = [f"{path.name} would be set aside as .{why}-..." for path, why in plan.set_aside]
    remarks += plan.warnings
    if plan.record is not None:
        refuses += _unusable_inputs(plan.record, plan.output_dir / BASE_NAME)
    elif stored is not None and stored.manifest is None:
        remarks.append("HF Trainer recorded neither the data nor the base model: give them")
    if stored is not None:
        step, max_steps = stored.progress["global_step"], stored.progress["max_steps"]
        found = {"checkpoint": str(stored.path), "step": step, "max_steps": max_steps}
        if step >= max_steps:
            remarks.append("finished: nothing is left to train")
    return {**found, "refuses": refuses, "remarks": remarks}


def _unusable_inputs(record: RunRecord, merged: Path) -> list[str]:
    found, now = [], dict(record.data_sha256)
    for split in record.data_sha256:
        file = getattr(record.arguments, f"{split}_file")
        if file is not None and Path(file).is_file():
            now[split] = file_fingerprint(Path(file))
        elif file is not None:
            found.append(f"the {split} file {file} is gone (give --{split}_file if it has moved)")
    found += [f"the {changed} has changed" for changed in changed_inputs(record, now)]
    try:  # the base is only looked for: a resume checks its fingerprint when it loads it
        name = str(merged) if merged.is_dir() else record.arguments.model_name_or_path
        locate(name, record.arguments.model_revision)
    except MiniloraError as error:
        found.append(str(error))
    return found
