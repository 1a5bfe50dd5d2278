"""In what two directories differ: tensors, arguments, log entries, and by how much."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.trained.directory import Directory
from minilora.training.evaluation import TIMING_KEYS
from minilora.training.trainer_files import OPTIMIZER_NAME, RNG_NAME, SCHEDULER_NAME


def compare_directories(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Every difference between two runs, checkpoints, adapters or models, timings aside. Arguments,
    log entries and the states of a checkpoint are compared where both have any.

    Returns:
        tensors: of each that differs, its name with max_abs and relative (the norm of the
        difference over that in `a`; None if that is 0), or what (only in one, another shape).
        equal_tensors: how many are bitwise equal. arguments: name, a, b. log: step, name, a, b.
    """
    sides = [Directory(Path(path)).read() for path in (a, b)]
    tensors, states = [side.tensors for side in sides], [_states(side) for side in sides]
    if all(states):
        tensors = [one | state for one, state in zip(tensors, states, strict=True)]
    differences = [
        {"name": name, **difference}
        for name in tensors[0] | tensors[1]
        if (difference := _difference(*(side.get(name) for side in tensors)))
    ]
    logs = [_log_entries(side.log) for side in sides]
    settings = [{**side.settings, "config": side.config or {}} for side in sides]
    shared = (settings[0].keys() & settings[1].keys()) - {"result"}  # which the log has
    flat = [dict(_flat("", {name: side[name] for name in shared})) for side in settings]
    return {
        "a": str(a),
        "b": str(b),
        "tensors": differences,
        "equal_tensors": len(tensors[0] | tensors[1]) - len(differences),
        "arguments": [{"name": name, **values} for name, values in _unequal(*flat)],
        "log": [
            {"step": step, "name": name, **values}
            for (step, name), values in (_unequal(*logs) if all(logs) else ())
        ],
    }


def _states(directory: Directory) -> dict[str, Any]:
    stored = directory.checkpoint
    if stored is None:
        return {}
    states = {OPTIMIZER_NAME: stored.optimizer, SCHEDULER_NAME: stored.scheduler}
    states[RNG_NAME] = stored.generators
    return dict(entry for name, state in states.items() for entry in _flat(f"{name}: ", state))


def _log_entries(rows: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    return {
        (row.get("step", 0), name): value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "epoch") and not name.endswith(TIMING_KEYS)
    }


def _unequal(a: dict[Any, Any], b: dict[Any, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    for key in sorted(a | b):
        if a.get(key) != b.get(key):
            yield key, {"a": a.get(key), "b": b.get(key)}


def _difference(a: Any, b: Any) -> dict[str, Any] | None:
    if a is None or b is None:
        return None if a is b else {"what": "only in b" if a is None else "only in a"}
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None if a == b else {"what": "differs"}
    if a.shape != b.shape or a.dtype != b.dtype:
        return {"what": f"{a.dtype} {tuple(a.shape)} in a, {b.dtype} {tuple(b.shape)} in b"}
    if torch.equal(a, b):
        return None
    a, b = a.double(), b.double()
    relative = ((a - b).norm() / a.norm()).item() if a.norm() > 0 else None
    return {"max_abs": (a - b).abs().max().item(), "relative": relative}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    # Dictionaries and lists of dictionaries are entered; any other list is a value.
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}{key}.", inner)
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        yield from _flat(prefix, dict(enumerate(value)))
    else:
        yield prefix.removesuffix("."), value
