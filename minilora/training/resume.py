"""What a resume would do: where it begins, what it refuses, warns of and sets aside.

`plan_resume` finds it out and changes nothing: `train` carries the plan out, `inspect` prints it.
"""

import contextlib
import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError
from minilora.files import commit_directory
from minilora.lora.config import BOOKKEEPING, LoraConfig
from minilora.options import differences
from minilora.training import distributed
from minilora.training.checkpoint import (
    Stored,
    first_valid,
    is_trainer_checkpoint,
    is_written,
    read_checkpoint,
    sorted_checkpoints,
)
from minilora.training.config import TrainConfig, reconcile, refuse_bending
from minilora.training.metrics_file import METRICS_NAME
from minilora.training.record import BASE_NAME, CHECKPOINT, MANIFEST_NAME, RUN_NAME, RunRecord
from minilora.training.trainer_files import STATE_NAME, recorded_arguments

NOTHING = f"holds neither a complete checkpoint-<step> nor a {RUN_NAME}"


@dataclass(frozen=True)
class ResumePlan:
    """What resuming from a run's directory, or from a checkpoint, would do. That of a new run has
    nothing but its place and arguments: it goes on from step 0.
    """

    output_dir: Path  # where the given path lies or a new one, never a recorded place
    config: TrainConfig | None  # the arguments to go on with; None where they are refused
    lora: LoraConfig | None
    stored: Stored | None = None  # the checkpoint to go on from, verified; None is step 0
    record: RunRecord | None = None  # what the run began with; None where HF Trainer alone has been
    # Newer checkpoints, and whether each is "invalid" or "superseded" (the user chose an older
    # one): HF Trainer's `get_last_checkpoint` would pick them otherwise.
    set_aside: list[tuple[Path, str]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # every reason found to refuse it
    warnings: list[str] = field(default_factory=list)

    def extended(self) -> list[int]:
        """The steps at which the end of the run was moved, the one of this resume included."""
        if self.record is None or self.config is None:
            return []
        old, new = self.record.arguments, self.config
        moved = (old.max_steps, old.num_train_epochs) != (new.max_steps, new.num_train_epochs)
        step = self.stored.progress["global_step"] if self.stored is not None else 0
        return [*self.record.extended, *[step] * moved]

    def resumed(self) -> list[int]:
        """The steps at which the run was gone on with, this one included."""
        before = self.record.resumed if self.record is not None else []
        return before if self.stored is None else [*before, self.stored.progress["global_step"]]

    def bring(self) -> None:
        """Copy the checkpoint to go on from, and the best so far, to where the run goes on, if that
        is another directory: it may be stopped before it saves there, and may end with the best.
        """
        if self.stored is None:
            return
        path, progress = self.stored.path, self.stored.progress
        found = {f"checkpoint-{progress['global_step']}": path}
        if CHECKPOINT.fullmatch(path.name):  # else nothing beside it is the run's
            best = f"checkpoint-{progress.get('best_global_step')}"
            found[best] = path.parent / best
        for name, there in found.items():
            if there.is_dir() and not (self.output_dir / name).exists():
                held = {file.name: file.read_bytes() for file in there.iterdir() if file.is_file()}
                commit_directory(self.output_dir / name, held)

    def accepted(self) -> "ResumePlan":
        """Itself, or an error with every reason to refuse it."""
        if self.refusals:
            raise MiniloraError("; ".join(self.refusals))
        return self


def directories(path: Path, asked: str | None) -> tuple[Path | None, Path]:
    """The directory of the run that `path`, it or its own checkpoint-<step>, belongs to, and the
    one to go on in: the same, or a new one that is `asked` for.

    A checkpoint of another name, such as a copy, belongs to none (None): nothing beside it is a
    run's.
    """
    if not path.is_dir():
        raise MiniloraError(f"resume_from_checkpoint {str(path)!r}: there is no such directory")
    path = path.resolve()  # so that "." and "checkpoint-4/" have a name and a parent
    own: Path | None = path
    if CHECKPOINT.fullmatch(path.name):
        own = path.parent
    elif (path / MANIFEST_NAME).exists():
        own = None
    elif not (path / RUN_NAME).is_file() and not sorted_checkpoints(path):
        if not (is_trainer_checkpoint(path) and is_written(path / STATE_NAME)):
            raise MiniloraError(f"resume_from_checkpoint {str(path)!r} {NOTHING}")
        own = None
    if asked is None and own is None:
        advice = "say with --output_dir where to go on"
        raise MiniloraError(f"{path} is no run's own checkpoint-<step>: {advice}")
    return own, Path(asked or own or path).resolve()


def after_a_loss(train_arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run; where torchrun starts it once more because a process was lost, of a
    resume of what it left in its own directory, if that was begun: of a resume into a new directory
    if it has a checkpoint, for before that all it has is in the old one.
    """
    if not any(distributed.gathered(distributed.restarts())):  # each host counts its own
        return train_arguments
    path, given = train_arguments.get("resume_from_checkpoint"), train_arguments.get("output_dir")
    output_dir = given if path is None else directories(Path(path), given)[1]
    place = Path(output_dir or "")
    begun = (place / RUN_NAME).is_file() if path is None else bool(sorted_checkpoints(place))
    if not distributed.by_first(lambda: begun and output_dir is not None):
        return train_arguments
    return {**train_arguments, "output_dir": None, "resume_from_checkpoint": str(output_dir)}


def plan_resume(
    path: Path,
    train_arguments: dict[str, Any] | None = None,
    lora_arguments: dict[str, Any] | None = None,
) -> ResumePlan:
    """What resuming from `path` with these arguments beside it would do.

    Of a run's directory it is the highest checkpoint that verifies. One that is named and damaged
    is an error, and so is a directory with nothing to resume.
    """
    own, output_dir = directories(path, (train_arguments or {}).get("output_dir"))
    path, newest_first = path.resolve(), sorted_checkpoints(own) if own is not None else []
    stored = first_valid(newest_first) if path == own else read_checkpoint(path)
    why = "invalid" if path == own else "superseded"
    newer = itertools.takewhile(lambda p: stored is None or p != stored.path, newest_first)
    aside = [(passed_over, why) for passed_over in newer] if own == output_dir else []
    manifest, record = (stored.manifest, stored.record) if stored is not None else (None, None)
    if manifest is None and own is not None and (own / RUN_NAME).is_file():
        record = RunRecord.read(own)
    elif record is not None and own is not None:
        with contextlib.suppress(MiniloraError):  # which the checkpoint can do without
            written = RunRecord.read(own)
            # A run that was extended and killed before it saved.
            record = written if len(written.extended) > len(record.extended) else record
            record = dataclasses.replace(record, resumed=written.resumed)
    if stored is None and record is None:
        raise MiniloraError(f"resume_from_checkpoint {str(path)!r} {NOTHING}")
    config, lora, refusals = None, None, []
    try:
        config, lora = _arguments(stored, record, train_arguments or {}, lora_arguments or {})
    except MiniloraError as error:
        refusals.append(str(error))
    if stored is None and record is not None and record.result is not None:
        reason = "is finished and kept no checkpoint (save_strategy no): nothing to resume"
        refusals.append(f"{output_dir} {reason}")
    if stored is not None and stored.missing() and not (config and config.allow_inexact_resume):
        advice = "the resumed run would be another (--allow_inexact_resume goes on all the same)"
        refusals.append(f"{stored.path} lacks {', '.join(stored.missing())}: {advice}")
    warnings = manifest.inexactness(config and config.device) if manifest is not None else []
    base = stored.adapter.config.base_model_name_or_path if stored and manifest is None else None
    if config is not None and base not in (None, config.model_name_or_path):
        took = config.model_name_or_path or "the packaged one"
        warnings.append(f"the checkpoint's adapter_config.json names the base {base}, not {took}")
    if stored is not None and stored.metrics() is None:
        last = "its last rows begin the log"
        warnings.append(f"{METRICS_NAME} beside {stored.path} is not that of its save: {last}")
    if config is not None and config.torch_compile:
        warnings.append("torch_compile chooses kernels anew: the resume may not be bit-exact")
    return ResumePlan(output_dir, config, lora, stored, record, aside, refusals, warnings)


def changed_inputs(record: RunRecord, data_sha256: dict[str, str]) -> list[str]:
    """Which of a run's files are not what it began with, told by their fingerprints."""
    given = record.arguments
    return [
        f"{split} file ({getattr(given, f'{split}_file') or given.dataset_name or 'packaged'})"
        for split, digest in record.data_sha256.items()
        if data_sha256.get(split) != digest
    ]


def check_same_inputs(plan: ResumePlan, record: RunRecord) -> None:
    """Refuse to resume on another base model, with its config.json and tokenizer, or on other data
    than the recorded.
    """
    if plan.record is None:
        return  # a new run, or Trainer's, which records neither
    began = dataclasses.replace(plan.record, arguments=record.arguments)
    changed = changed_inputs(began, record.data_sha256)
    whole, merges = record.model_sha256, record.arguments.on_adapter == "merge"
    # An older version recorded a merged base without its head.
    if began.model_sha256 not in (whole, whole.partition(" ")[0] if merges else whole):
        name = record.arguments.model_name_or_path or "packaged"
        name = f"{plan.output_dir / BASE_NAME} or {name}" if merges else name
        changed.append(f"base model or adapter ({name})")
    if record.labels != began.labels:
        changed.append("labels")
    old, new = began.base_settings, record.base_settings
    # Another version of transformers may know other settings.
    settings = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    if settings:
        told = ", ".join(f"{name} {old[name]} -> {new[name]}" for name in settings)
        changed.append(f"config.json of the base model ({told})")
    kept = began.tokens_sha256.items()
    if not changed and any(
        record.tokens_sha256.get(split, found) != found for split, found in kept
    ):
        changed.append("tokenizer of the base model (it makes other tokens of the same text)")
    if changed:
        reason = f"not what the run began with: {', '.join(changed)}"
        advice = "restore it, or start a new run"
        raise MiniloraError(f"cannot resume {plan.output_dir}: {reason}; {advice}")


def _arguments(
    stored: Stored | None,
    record: RunRecord | None,
    train_arguments: dict[str, Any],
    lora_arguments: dict[str, Any],
) -> tuple[TrainConfig, LoraConfig]:
    """The recorded arguments, with those applied that a resume may change. Where only HF Trainer
    has been, the given ones, completed by what its files tell.
    """
    told: dict[str, Any] = {}
    if stored is not None and stored.manifest is None:
        told = recorded_arguments(stored.progress, stored.parts, stored.path)
    if record is not None:
        config, lora = reconcile(record.arguments, train_arguments), record.lora
        named = stored and stored.adapter.config.base_model_name_or_path
        if named and str(Path(named).resolve()) == config.model_name_or_path:
            config = dataclasses.replace(config, model_name_or_path=named)  # as it was given
        if config.extend and stored is not None and stored.stopped_early():
            raise MiniloraError(f"extend: {stored.path} is where the run stopped early")
    elif stored is not None and told:
        base, named = stored.adapter.config, {}
        if "model_name_or_path" not in train_arguments:
            named["model_name_or_path"] = base.base_model_name_or_path
            named["model_revision"] = base.revision
        config = TrainConfig(**{**named, **told, **train_arguments})
        if config.extend:
            raise MiniloraError(f"extend: {stored.path} is HF Trainer's: resume it first")
        lora = dataclasses.replace(stored.adapter.config, inference_mode=False)
    else:
        advice = "load_checkpoint restores it there"
        raise MiniloraError(
            f"a loop of your own wrote the checkpoint and recorded no run: {advice}"
        )
    if config.max_steps <= 0:
        told.pop("max_steps", None)  # counted in epochs here; the schedule's check compares them
    asked = {name: value for name, value in lora_arguments.items() if name not in BOOKKEEPING}
    bending = [f"{change} (in Trainer's files)" for change in differences(config, told)]
    refuse_bending(differences(lora, asked) + bending)
    return config, lora


def check_ranks(plan: ResumePlan, record: RunRecord, examples: int) -> None:
    """Refuse several processes that do not agree, or have nothing to share."""
    world_size, step = distributed.world_size(), plan.stored and plan.stored.progress["global_step"]
    if examples < world_size:
        raise MiniloraError(f"{world_size} processes for {examples} examples: start fewer")
    if record.arguments.hf_parity and record.world_size != world_size:
        began = f"the run began with {record.world_size} processes, and there are {world_size}"
        raise MiniloraError(f"{began}: with hf_parity they must be as many")
    inputs = {"data": record.data_sha256, "labels": record.labels, "base": record.model_sha256}
    inputs |= {"config.json": record.base_settings, "tokens": record.tokens_sha256}
    settings = vars(record.arguments) | vars(record.lora) | record.environment
    distributed.check_agreement(settings | inputs | {"step": step})
