"""Runs side by side in one page: their curves, in what they differ, how they ended.

Written here are the tables, each curve in numbers among them; the script in report.html draws. What
comes from files is escaped, and the page forbids itself the network and every other script.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError, harmless
from minilora.files import json_text, write_file
from minilora.options import has_type
from minilora.trained.directory import Directory
from minilora.training.checkpoint import first_valid, sorted_checkpoints
from minilora.training.config import TrainConfig
from minilora.training.evaluation import TIMING_KEYS

TEMPLATE = Path(__file__).with_name("report.html")
UNRANKED = ("learning_rate", "grad_norm", "threshold", "preparation_time")  # neither good nor bad


@dataclass(frozen=True)
class Run:
    label: str
    curves: dict[str, list[tuple[int, float]]]  # (step, value)
    final: dict[str, float]  # the result, or without one what was last evaluated
    settings: dict[str, Any]
    by_class: dict[str, dict[str, float]]  # precision, recall, ... of each, of a finished run
    confusion: list[list[int]]  # true class by predicted, where they are few
    marked: list[int]  # the steps at which its end was moved, or exactness lost
    state: str


def write_report(runs: Sequence[str | Path], output: str | Path) -> list[str]:
    """Write the page of these runs (or checkpoints, HF Trainer's too), whole or not at all, in
    place of nothing but an older page. Returns what each run is called in it.
    """
    output, mark = Path(output), TEMPLATE.read_bytes().partition(b"\n")[0]
    if os.path.lexists(output) and not (output.is_file() and mark in output.read_bytes()[:99]):
        raise MiniloraError(f"{output} exists and is no report: give a new name, or move it away")
    if not output.parent.is_dir():
        raise MiniloraError(f"{output}: there is no such directory to write to")
    found = [read_run(Path(run), label) for run, label in zip(runs, labels_of(runs), strict=True)]
    if not any(run.curves for run in found):
        advice = "train first, or with smaller --logging_steps"
        raise MiniloraError(f"{', '.join(map(str, runs))}: no row has been logged yet; {advice}")
    write_file(output, page_of(found).encode(errors="replace"))
    return [run.label for run in found]


def labels_of(runs: Sequence[str | Path]) -> list[str]:
    """The directories' names; of those named alike, with number and path."""
    names = [harmless(Path(os.path.realpath(run)).name) for run in runs]
    apart = [f"{name} ({k}: {harmless(str(runs[k - 1]))})" for k, name in enumerate(names, 1)]
    return [a if names.count(name) > 1 else name for name, a in zip(names, apart, strict=True)]


def read_run(path: Path, label: str) -> Run:
    directory = Directory(path).read()
    settings, position, log = directory.settings, directory.position, directory.log
    if position is None:
        has_none = f"is of the kind {directory.kind!r}, which has no log"
        raise MiniloraError(f"{path} {has_none}: give a run's directory, or a checkpoint")
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in log:
        for name, value in metrics_of(row).items():
            curves.setdefault(name, []).append((row["step"], value))
    last = {name: points[-1][1] for name, points in curves.items() if name.startswith("eval_")}
    flat = {name: settings[name] for name in ("data_sha256", "model_sha256") if name in settings}
    for section in ("environment", "lora", "arguments"):
        flat = {**settings.get(section, {}), **flat}
    told = [f"step {log[-1]['step'] if log else 0}"]
    told += ["unfinished"] if position.get("finished") is False else []
    marked = []
    for event in ("extended", "resumed"):
        marked += settings.get(event, [])
        told += [f"{event} at step {step}" for step in settings.get(event, [])]
    newest = directory.checkpoint or first_valid(sorted_checkpoints(path))
    inexact = newest and newest.manifest and newest.manifest.state["inexact_from"]
    if inexact is not None:
        told, marked = [*told, f"inexact from step {inexact}"], [*marked, inexact]
    result = settings.get("result") or {}
    by_class: Any = result.get("eval_per_class")
    confusion: Any = result.get("eval_confusion_matrix")
    by_class = by_class if has_type(by_class, dict[str, dict[str, float]]) else {}
    confusion = confusion if has_type(confusion, list[list[int]]) else []
    final, state = metrics_of(result or last), "; ".join(told)
    return Run(label, curves, final, flat, by_class, confusion, marked, state)


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """Of a row, or a result, what is a number (NaN is null there), and no position or timing."""
    return {
        name: value
        for name, value in row.items()
        if name not in ("step", "epoch", "total_flos") and not name.endswith(TIMING_KEYS)
        if has_type(value, float) and abs(value) < 1e300
    }


def page_of(runs: list[Run]) -> str:
    """The page; the same for the same runs, byte by byte."""
    template, labels = TEMPLATE.read_text("utf-8"), [run.label for run in runs]
    script = template.partition("<script>")[2].partition("</script>")[0]
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    names.sort(key=lambda name: (name in UNRANKED, name != "loss"))
    steps = [step for run in runs for points in run.curves.values() for step, _ in points]
    data = {
        "labels": labels,
        "marked": [run.marked for run in runs],
        "curves": [[run.curves.get(name, []) for run in runs] for name in names],
        "range": [min(steps), max(max(steps), min(steps) + 1)],
    }
    rows = [setting_row(name, runs) for name in dict.fromkeys(n for r in runs for n in r.settings)]
    differing = [row for row in rows if len({*row[1:]} - {"-"}) > 1]
    told = [f"{escaped(run.label)} <small>{run.state}</small>" for run in runs]
    pieces = {
        "policy": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": escaped(", ".join(labels)),
        "runs": "\n".join(f"<button disabled>{name}</button>" for name in told),
        "figures": "\n".join(figure(name, runs) for name in names),
        "final": table(["metric", *labels], final_rows(runs)),
        "classes": "\n".join(map(classes, runs)),
        "differing": table(["argument", *labels], differing) if differing else "none",
        "all": table(["argument", *labels], rows),
        "data": json_text(data).replace("<", "\\u003c"),
    }
    return re.sub("<!--([a-z]+)-->", lambda found: pieces[found[1]], template)


def figure(name: str, runs: list[Run]) -> str:
    """A curve in numbers; the script draws it above them."""
    rows = []
    for run in runs:
        if points := [(value, step) for step, value in run.curves.get(name, [])]:
            chosen = (points[0], min(points), max(points), points[-1])
            rows.append([run.label, *(f"{value:.4g} ({step})" for value, step in chosen)])
    numbers = table(["value (step)", "first", "lowest", "highest", "last"], rows)
    return f"""<figure>
<figcaption><b>{escaped(name)}</b> <small>{direction(name)}</small></figcaption>
<details open><summary>in numbers</summary>{numbers}</details>
</figure>"""


def direction(name: str) -> str:
    """Which values of a metric are the better ones, by the rule that ranks checkpoints."""
    if name.endswith(UNRANKED):
        return ""
    is_greatest = TrainConfig(metric_for_best_model=name).best_is_greatest()
    return "higher is better" if is_greatest else "lower is better"


def final_rows(runs: list[Run]) -> list[list[str]]:
    """A metric in each row, where values differ the best with a star."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.final):
        values, better = [run.final.get(name) for run in runs], direction(name)
        known = sorted({value for value in values if value is not None})
        best = known[-1 if "higher" in better else 0] if better and known[1:] else None
        cells = ("-" if v is None else f"{v:.4g}" + "\xa0★" * (v == best) for v in values)
        rows.append([name, *cells])
    return rows


def classes(run: Run) -> str:
    """How its final model did by class, and where they are few, which it took for which."""
    if not run.by_class:
        return ""
    head = ["class", *next(iter(run.by_class.values()))]
    rows = [
        [name, *(f"{v:.4f}" if isinstance(v, float) else str(v) for v in scores.values())]
        for name, scores in run.by_class.items()
    ]
    tables = table(head, rows)
    if run.confusion:
        counts = zip(run.by_class, run.confusion, strict=False)
        rows = [[name, *map(str, row)] for name, row in counts]
        tables += table(["true \\ predicted", *run.by_class], rows)
    return f"<details open><summary>{escaped(run.label)}, by class</summary>{tables}</details>"


def setting_row(name: str, runs: list[Run]) -> list[str]:
    values = [run.settings.get(name, "-") for run in runs]  # "-": nobody recorded it
    return [name, *(v if isinstance(v, str) else json.dumps(v, sort_keys=True) for v in values)]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Of cells as they read: here they are escaped."""
    lines = ["".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)]
    for first, *cells in rows:
        rest = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        lines.append(f'<th scope="row">{escaped(first)}</th>{rest}')
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    region = f'class="scroll" tabindex="0" role="region" aria-label="by {escaped(head[0])}"'
    return f"<div {region}><table>{body}</table></div>"


def escaped(text: str) -> str:
    return html.escape(harmless(text))
