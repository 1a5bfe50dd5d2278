"""In what two directories differ: tensors, arguments, log entries, and by how much."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.reading import read_torch
from minilora.trained import kinds
from minilora.trained.inspection import log_rows, named_tensors, recorded_run, stored_config
from minilora.training.evaluation import TIMING_KEYS
from minilora.training.trainer_files import NUMPY_GLOBALS, OPTIMIZER_NAME, RNG_NAME, SCHEDULER_NAME

STATES = (OPTIMIZER_NAME, SCHEDULER_NAME, RNG_NAME)


def compare_directories(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Every difference between two runs, checkpoints, adapters or models, timings aside.

    Arguments, log entries and the states of optimizer, schedule and generators are compared where
    both have any.

    Returns:
        tensors: of each that differs, its name with max_abs and relative (the norm of the difference
        over the norm in `a`; None if that is 0), or what (only in one, another shape).
        equal_tensors: how many are bitwise equal. arguments: name, a, b. log: step, name, a, b.

    Raises:
        MiniloraError: one of them is no known kind, or damaged.
    """
    left, right = [(path, kinds.kind_of(path)) for path in (Path(a), Path(b))]
    states = [_states(*side) for side in (left, right)]
    tensors = [dict(named_tensors(*side)) for side in (left, right)]
    if all(states):
        tensors = [{**one, **state} for one, state in zip(tensors, states, strict=True)]
    differing = [
        {"name": name, **difference}
        for name in tensors[0] | tensors[1]
        if (difference := _difference(tensors[0].get(name), tensors[1].get(name)))
    ]
    settings = _settings(*left), _settings(*right)
    shared = settings[0].keys() & settings[1].keys()
    arguments = [dict(_flat("", {name: side[name] for name in shared})) for side in settings]
    logs = [_log_entries(log_rows(*side)) for side in (left, right)]
    return {
        "a": str(a),
        "b": str(b),
        "tensors": differing,
        "equal_tensors": len(tensors[0] | tensors[1]) - len(differing),
        "arguments": [
            {"name": name, "a": one, "b": other} for name, one, other in _pairs(*arguments)
        ],
        "log": [
            {"step": step, "name": name, "a": one, "b": other}
            for (step, name), one, other in (_pairs(*logs) if all(logs) else ())
        ],
    }


def _states(path: Path, kind: str) -> dict[str, Any]:
    if kind not in (kinds.CHECKPOINT_OF_OURS, kinds.CHECKPOINT_OF_TRAINER):
        return {}
    present = [name for name in STATES if (path / name).is_file()]
    return {
        key: value
        for name in present
        for key, value in _flat(f"{name}: ", read_torch(path / name, NUMPY_GLOBALS))
    }


def _settings(path: Path, kind: str) -> dict[str, Any]:
    record = recorded_run(path, kind) or {}
    # What was asked and what it met; the result is compared in the log.
    sections = {name: value for name, value in record.items() if name != "result"}
    return {**sections, "config": stored_config(path, kind) or {}}


def _pairs(a: dict[Any, Any], b: dict[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    for key in sorted(a | b):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def _log_entries(rows: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    return {
        (row.get("step", 0), name): value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "epoch") and not name.endswith(TIMING_KEYS)
    }


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
        for index, inner in enumerate(value):
            yield from _flat(f"{prefix}{index}.", inner)
    else:
        yield prefix.removesuffix("."), value
