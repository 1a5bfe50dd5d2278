"""What a directory is and what is in it, as plain data. Changes nothing, runs nothing it reads, and
never builds a model: of the base model only the header of its file is looked at.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from minilora.bert.stored import parameter_count, stored_tensors
from minilora.bert.weights import packaged_model
from minilora.errors import MiniloraError
from minilora.lora.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_config, read_tensors
from minilora.trained import kinds
from minilora.trained.outlook import resume_outlook
from minilora.training.checkpoint import sorted_checkpoints
from minilora.training.manifest import verify
from minilora.training.run import METRICS_NAME, read_run
from minilora.training.trainer_files import (
    STATE_NAME,
    missing_parts,
    read_progress,
    recorded_arguments,
)

# A JSON file of a foreign directory that is larger is not what its name says.
MAX_JSON_BYTES = 50_000_000


def inspect_directory(path: str | Path) -> dict[str, Any]:
    """What `path` is and holds.

    Returns:
        kind, what (the kind in words), problems (why it does not verify; empty if all is well),
        verified (True where every hash was checked, None where there are none), position (step,
        epoch, ...), config (the adapter's, or the model's), arguments (the run's), tensors (name,
        shape, dtype, norm of each; None for a norm that is not finite), trainable (parameters, of, percent), log (rows, last), resume
        (see `resume_outlook`; None where there is nothing to resume).

    Raises:
        MiniloraError: no directory, or none of the known kinds; says what was looked for.
    """
    path = Path(path)
    kind = kinds.kind_of(path)
    problems: list[str] = []
    found: dict[str, Any] = {"path": str(path), "kind": kind, "what": kinds.WHAT[kind]}
    found["problems"] = problems
    found["verified"] = _collect(problems, _verified, path, kind)
    record = _collect(problems, recorded_run, path, kind) or {}
    found["position"] = _collect(problems, _position, path, kind)
    found["config"] = _collect(problems, stored_config, path, kind)
    found["arguments"] = record.get("arguments")
    found["labels"] = record.get("labels")
    found["result"] = record.get("result")
    found["tensors"] = _collect(problems, _described_tensors, path, kind) or []
    broken = [tensor["name"] for tensor in found["tensors"] if tensor["norm"] is None]
    problems += [f"{path}: {name} holds NaN or infinity" for name in broken]
    found["trainable"] = _trainable(found)
    rows = _collect(problems, log_rows, path, kind) or []
    found["log"] = {"rows": len(rows), "last": rows[-1] if rows else None}
    resumable = (kinds.RUN, kinds.CHECKPOINT_OF_OURS, kinds.CHECKPOINT_OF_TRAINER, kinds.INCOMPLETE)
    found["resume"] = resume_outlook(path) if kind in resumable else None
    return found


def named_tensors(path: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights that a directory of this kind holds: its adapter's, or the
    model's.

    Raises:
        MiniloraError: a file is damaged.
    """
    if kind == kinds.MODEL:
        yield from stored_tensors(str(path))
    elif any((path / name).is_file() for name in (WEIGHTS_NAME, "adapter_model.bin")):
        yield from sorted(read_tensors(path).items())


def stored_config(path: Path, kind: str) -> dict[str, Any] | None:
    """The adapter's config, or the model's, as it lies there.

    Raises:
        MiniloraError: damaged, or minilora refuses it.
    """
    if kind == kinds.MODEL:
        return _json_object(path / "config.json")
    if not (path / CONFIG_NAME).is_file():
        return None
    read_config(path)  # says what minilora would refuse
    return _json_object(path / CONFIG_NAME)


def recorded_run(path: Path, kind: str) -> dict[str, Any] | None:
    """What our files record of the run (arguments, lora, labels, fingerprints, environment), or
    what Trainer's tell of its arguments.

    Raises:
        MiniloraError: damaged.
    """
    if kind == kinds.RUN:
        return read_run(path)
    if kind == kinds.CHECKPOINT_OF_OURS:
        return verify(path).run
    if kind == kinds.CHECKPOINT_OF_TRAINER:
        return {"arguments": recorded_arguments(path)}
    return None


def log_rows(path: Path, kind: str) -> list[dict[str, Any]]:
    """The log entries: a run's metrics.jsonl, a checkpoint's log_history.

    Raises:
        MiniloraError: damaged.
    """
    if kind == kinds.RUN and (path / METRICS_NAME).is_file():
        lines = (path / METRICS_NAME).read_text().splitlines()
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise MiniloraError(f"{path / METRICS_NAME} is damaged: {error}") from None
    return read_progress(path)["log_history"] if (path / STATE_NAME).is_file() else []


def _verified(path: Path, kind: str) -> bool | None:
    if kind == kinds.CHECKPOINT_OF_OURS:
        verify(path)
        return True
    if kind == kinds.RUN:
        checkpoints = sorted_checkpoints(path)
        broken: list[str] = []
        for checkpoint in checkpoints:
            _collect(broken, _verified, checkpoint, kinds.kind_of(checkpoint))
        if broken:
            raise MiniloraError("; ".join(broken))
        return True if checkpoints else None
    if kind == kinds.INCOMPLETE:
        raise MiniloraError(
            f"{path} has neither minilora.json nor training_args.bin: its writer was stopped"
        )
    missing = missing_parts(path) if kind == kinds.CHECKPOINT_OF_TRAINER else []
    if missing:
        raise MiniloraError(f"{path} lacks {', '.join(missing)}")
    return None


def _position(path: Path, kind: str) -> dict[str, Any] | None:
    if kind == kinds.RUN:
        checkpoints = [checkpoint.name for checkpoint in sorted_checkpoints(path)]
        return {"finished": "result" in read_run(path), "checkpoints": checkpoints}
    if not (path / STATE_NAME).is_file():
        return None
    progress = read_progress(path)
    position = {
        "step": progress["global_step"],
        "max_steps": progress["max_steps"],
        "epoch": progress["epoch"],
    }
    if kind == kinds.CHECKPOINT_OF_OURS:
        state = verify(path).state
        position |= {name: state[name] for name in ("step_in_epoch", "inexact_from")}
    return position


def _described_tensors(path: Path, kind: str) -> list[dict[str, Any]]:
    found = []
    for name, tensor in named_tensors(path, kind):
        norm = tensor.double().norm().item()
        found.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "norm": norm if math.isfinite(norm) else None,  # JSON has no NaN
            }
        )
    return found


def _trainable(found: dict[str, Any]) -> dict[str, Any] | None:
    if found["kind"] == kinds.MODEL or not found["tensors"]:
        return None
    trained = sum(math.prod(tensor["shape"]) for tensor in found["tensors"])
    base = _base_parameters(found)
    if base is None:
        return {"parameters": trained, "of": None, "percent": None}
    total = trained + base
    return {"parameters": trained, "of": total, "percent": 100 * trained / total}


def _base_parameters(found: dict[str, Any]) -> int | None:
    config, arguments = found["config"] or {}, found["arguments"] or {}
    name = config.get("base_model_name_or_path") or arguments.get("model_name_or_path")
    try:
        return parameter_count(name or str(packaged_model()))
    except MiniloraError:
        return None


def _collect(problems: list[str], read: Any, path: Path, kind: str) -> Any:
    # A damaged part is something to report, and no reason not to report the others.
    try:
        return read(path, kind)
    except (MiniloraError, OSError) as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def _json_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise MiniloraError(f"{path} is {path.stat().st_size:,} bytes: it is no config")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MiniloraError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise MiniloraError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values
