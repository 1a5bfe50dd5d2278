"""Say what a directory is, whether it verifies, and what a resume would do with it.

    python -m minilora.inspect PATH [--tensors] [--json]
    python -m minilora.inspect --diff A B [--json]

PATH: a run, a checkpoint (ours or HF Trainer's), a PEFT adapter, a model. Nothing in it is run or
changed, and no model is loaded.
"""

import argparse
import json
import sys
from typing import Any

from minilora.command import Parser, run_command

SHOWN = 20
"""Differences printed of each sort; --json has all of them."""

TIMINGS = ("runtime", "per_second")
SUMMARY = ("path", "kind", "verified", "problems", "position", "trainable", "resume")


def main() -> int:
    """Parse, look, print. Returns the exit code."""
    asked = parse_arguments(sys.argv[1:])
    if asked.diff:
        from minilora.trained.comparison import compare_directories  # the slow import: torch

        found = compare_directories(*asked.diff)
        report = difference_report(found)
        summary = {name: len(found[name]) for name in ("tensors", "arguments", "log")}
    else:
        from minilora.trained.inspection import inspect_directory

        found = inspect_directory(asked.path)
        report = directory_report(found, with_tensors=asked.tensors)
        summary = {name: found[name] for name in SUMMARY}
    if not asked.json:
        print("\n".join(report))
    print(json.dumps(found if asked.json else summary))
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The flags of this command."""
    parser = Parser(
        prog="python -m minilora.inspect",
        usage="%(prog)s (PATH | --diff A B) [flags]",
        description="Say what a directory is, whether it verifies, and what a resume would do.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "path", metavar="PATH", nargs="?", help="a run, checkpoint, adapter or model"
    )
    parser.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="in what two directories differ"
    )
    parser.add_argument(
        "--tensors", action="store_true", help="list every tensor with shape and norm"
    )
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object only")
    asked = parser.parse_args(arguments)
    if (asked.path is None) == (asked.diff is None):
        parser.error("give one PATH, or two with --diff A B")
    return asked


def directory_report(found: dict[str, Any], with_tensors: bool) -> list[str]:
    """Lines for a person, from what `inspect_directory` returns."""
    lines = [f"{found['path']}: {found['what']}"]
    for name, value in [*(found["position"] or {}).items(), *_shown(found["config"] or {})]:
        lines.append(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
    if found["labels"]:
        lines.append(f"  labels: {', '.join(found['labels'])}")
    if found["trainable"]:
        trained = found["trainable"]
        share = f" of {trained['of']:,} ({trained['percent']:.4f}%)" if trained["of"] else ""
        lines.append(f"  trained parameters: {trained['parameters']:,}{share}")
    lines.append(f"  tensors: {len(found['tensors'])}")
    if with_tensors:
        for tensor in found["tensors"]:
            shape = "x".join(map(str, tensor["shape"]))
            norm = "not finite" if tensor["norm"] is None else f"{tensor['norm']:.6g}"
            lines.append(f"    {tensor['name']}  {shape}  {tensor['dtype']}  norm {norm}")
    last = found["log"]["last"] or {}
    shown = {name: value for name, value in last.items() if not name.endswith(TIMINGS)}
    lines.append(f"  log: {found['log']['rows']} rows, the last {json.dumps(shown)}")
    words = {True: "every hash", None: "nothing that has hashes"}
    lines.append(f"  verified: {words.get(found['verified'], 'no')}")
    lines += [f"  problem: {problem}" for problem in found["problems"]]
    return lines + _resume_lines(found["resume"])


def difference_report(found: dict[str, Any]) -> list[str]:
    """Lines for a person, from what `compare_directories` returns."""
    tensors, lines = found["tensors"], [f"a: {found['a']}", f"b: {found['b']}"]
    lines.append(f"tensors: {len(tensors)} differ, {found['equal_tensors']} are equal bit for bit")
    for tensor in tensors[:SHOWN]:
        what = tensor.get("what") or f"by up to {tensor['max_abs']:.3g}"
        if tensor.get("relative") is not None:
            what += f", {tensor['relative']:.3g} of its norm"
        lines.append(f"  {tensor['name']}: {what}")
    for sort in ("arguments", "log"):
        lines.append(f"{sort}: {len(found[sort])} differ")
        for entry in found[sort][:SHOWN]:
            step = f"step {entry['step']}, " if "step" in entry else ""
            lines.append(f"  {step}{entry['name']}: {entry['a']} -> {entry['b']}")
    return lines


def _shown(config: dict[str, Any]) -> list[tuple[str, Any]]:
    names = (
        "model_type", "architectures", "hidden_size", "num_hidden_layers", "id2label",
        "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
        "modules_to_save", "use_dora", "use_rslora", "bias",
    )  # fmt: skip
    return [(name, config[name]) for name in names if config.get(name) not in (None, False)]


def _resume_lines(resume: dict[str, Any] | None) -> list[str]:
    if resume is None:
        return []
    place = resume["checkpoint"] or "no checkpoint"
    steps = f"step {resume['step']} of {resume['max_steps'] or 'its run'}"
    head = "  resume: would be refused" if resume["refuses"] else f"  resume: from {place}, {steps}"
    reasons = [f"    because {reason}" for reason in resume["refuses"]]
    return [head, *reasons, *(f"    {remark}" for remark in resume["remarks"])]


if __name__ == "__main__":
    run_command(main)
