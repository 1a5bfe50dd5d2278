"""In what two directories differ: tensors, arguments, log entries, and by how much."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.trained.directory import Directory
from minilora.training.evaluation import TIMING_KEYS


def compare_directories(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Every difference between two runs, checkpoints, adapters or models, timings aside. Arguments,
    log entries and the states of a checkpoint are compared where both have any. Of a tensor that
    differs, relative is the norm of the difference over that in `a`, None if that is 0; what stands
    for both numbers where there are none (only in one, another shape).
    """
    sides = [Directory(Path(path)).read() for path in (a, b)]
    stored = [side.checkpoint for side in sides if side.checkpoint]
    states = [dict(_flat("", one.parts)) for one in stored] if len(stored) == 2 else [{}, {}]
    tensors = [{**side.tensors, **state} for side, state in zip(sides, states, strict=True)]
    names = tensors[0] | tensors[1]
    found = {name: _difference(*(side.get(name) for side in tensors)) for name in names}
    differences = [{"name": name, **values} for name, values in found.items() if values]
    settings = [{**side.settings, "config": side.config or {}} for side in sides]
    shared = (settings[0].keys() & settings[1].keys()) - {"result"}  # which the log has
    arguments = [dict(_flat("", {name: side[name] for name in shared})) for side in settings]
    logs = [_log_entries(side.log) for side in sides]
    return {
        "a": str(a),
        "b": str(b),
        "tensors": differences,
        "equal_tensors": len(names) - len(differences),
        "arguments": [{"name": name, **values} for name, values in _unequal(*arguments)],
        "log": [
            {"step": step, "name": name, **values}
            for (step, name), values in (_unequal(*logs) if all(logs) else ())
        ],
    }


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
        return None if _plain(a) == _plain(b) else {"what": "differs"}
    if a.shape != b.shape or a.dtype != b.dtype:
        return {"what": f"{a.dtype} {tuple(a.shape)} in a, {b.dtype} {tuple(b.shape)} in b"}
    if torch.equal(a, b):
        return None
    a, b = a.double(), b.double()
    relative = ((a - b).norm() / a.norm()).item() if a.norm() > 0 else None
    return {"max_abs": (a - b).abs().max().item(), "relative": relative}


def _plain(value: Any) -> Any:
    # HF Trainer keeps a generator's words as an array, we as a list.
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray | Tensor) else value


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    # Dictionaries and lists of dictionaries are entered; any other list is a value.
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}{key}.", inner)
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        yield from _flat(prefix, dict(enumerate(value)))
    else:
        yield prefix.removesuffix("."), value
