"""Say what a directory is, whether it verifies, and what a resume would do with it.

    python -m minilora.inspect PATH [--tensors] [--json]
    python -m minilora.inspect --diff A B [--json]

PATH: a run, checkpoint (ours or HF Trainer's), adapter or model. Nothing is run, nothing changed.
"""

import argparse
import json
import sys
from typing import Any

from minilora import command

SHOWN = 20  # differences printed of each sort; --json has all of them
SUMMARY = ("path", "kind", "verified", "problems", "position", "trainable", "resume")
CONFIG = (
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "id2label", "r",
    "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_dora", "use_rslora",
    "bias", "base_model_name_or_path",
)  # fmt: skip


def main() -> int:
    """Parse, look, print. Returns the exit code."""
    asked = parse_arguments(sys.argv[1:])
    if asked.diff:
        from minilora.trained.compare import compare_directories  # the slow import: torch

        found = compare_directories(*asked.diff)
        report = difference_report(found)
        summary = {name: len(found[name]) for name in ("tensors", "arguments", "log")}
    else:
        from minilora.trained.directory import inspect_directory

        found = inspect_directory(asked.path)
        report = directory_report(found, with_tensors=asked.tensors)
        summary = {name: found[name] for name in SUMMARY}
    if not asked.json:
        print("\n".join(report))
    print(json.dumps(found if asked.json else summary))
    return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command.Parser("python -m minilora.inspect", usage=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("path", metavar="PATH", nargs="?", help="a run, checkpoint, adapter or model")
    add("--diff", nargs=2, metavar=("A", "B"), help="in what two directories differ")
    add("--tensors", action="store_true", help="list every tensor with shape and norm")
    add("--json", action="store_true", help="everything, as one JSON object only")
    asked = parser.parse_args(arguments)
    if (asked.path is None) == (asked.diff is None):
        parser.error("give one PATH, or two with --diff A B")
    return asked


def directory_report(found: dict[str, Any], with_tensors: bool) -> list[str]:
    """Lines for a person, from what `inspect_directory` returns."""
    config, lines = found["config"] or {}, [f"{found['path']}: {found['kind']}"]
    shown = {name: config[name] for name in CONFIG if config.get(name) not in (None, False)}
    named = {**(found["position"] or {}), **shown, "labels": found["labels"]}
    named["trained parameters"] = found["trainable"] and f"{found['trainable']['parameters']:,}"
    for name, value in named.items():
        if value is not None:
            lines.append(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")
    lines.append(f"  tensors: {len(found['tensors'])}")
    for tensor in found["tensors"] if with_tensors else []:
        shape = "x".join(map(str, tensor["shape"]))
        norm = "not finite" if tensor["norm"] is None else f"{tensor['norm']:.6g}"
        lines.append(f"    {tensor['name']}  {shape}  {tensor['dtype']}  norm {norm}")
    lines.append(f"  log: {found['log']['rows']} rows, the last {json.dumps(found['log']['last'])}")
    otherwise = "no" if found["problems"] else "nothing that has hashes"
    lines.append(f"  verified: {'every hash' if found['verified'] else otherwise}")
    lines += [f"  problem: {problem}" for problem in found["problems"]]
    resume = found["resume"]
    if resume is None:
        return lines
    place, total = resume["checkpoint"] or "no checkpoint", resume["max_steps"] or "its run"
    would = f"from {place}, step {resume['step']} of {total}"
    lines.append(f"  resume: {'would be refused' if resume['refuses'] else would}")
    lines += [f"    because {reason}" for reason in resume["refuses"]]
    return lines + [f"    {remark}" for remark in resume["remarks"]]


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


if __name__ == "__main__":
    command.run_command(main)
