"""The model card of a trained adapter: README.md with the metadata that the Hub reads.

Written by hand rather than by a YAML library, which is not among the core's packages: every string
is a JSON string, and JSON strings are YAML.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

from minilora.bert.weights import PACKAGED_MODEL, packaged_model
from minilora.errors import MiniloraError
from minilora.lora.config import BOOKKEEPING, LoraConfig
from minilora.training.config import LORA_DEFAULTS, TrainConfig

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
# Our metrics under the Hub's names.
METRICS = {
    "eval_accuracy": "accuracy",
    "eval_f1": "f1",
    "eval_matthews": "matthews_correlation",
    "eval_mse": "mse",
    "eval_pearson": "pearsonr",
    "eval_spearman": "spearmanr",
}
PATHS = ("train_file", "validation_file", "test_file", "model_name_or_path")
NOT_SHOWN = ("output_dir", "resume_from_checkpoint", "device")


def model_card(name: str, base: str, merged: str | None, run: dict[str, Any]) -> str:
    """The text of README.md.

    Args:
        name: of the adapter, usually its directory's.
        base: where the base model was loaded from, a hub id or a directory.
        merged: the adapter that was merged into the base first, if one was. What was trained then fits
            no model that has a name, and no lines for PEFT are given.
        run: what run.json records, the result included.
    """
    arguments, lora, labels = run["arguments"], run["lora"], run["labels"]
    hub_id = base_id(base) if merged is None else None
    metrics = {hub: run["result"][ours] for ours, hub in METRICS.items() if ours in run["result"]}
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
    shown_base = f"`{base_id(base) or Path(base).name}`"
    if merged is not None:
        shown_base += f" with the adapter `{Path(merged).name}` merged into it"
    return "\n".join(
        [
            "---",
            *_metadata(name, hub_id, metrics, _data_name(arguments)),
            "---",
            "",
            f"# {name}",
            "",
            f"A LoRA adapter (r={lora['r']}, lora_alpha={lora['lora_alpha']}) for {shown_base}; "
            + ("it predicts a number." if labels is None else f"classes: {_listed(labels)}."),
            f"On `{_data_name(arguments)}`: {scores}." if scores else "It was not evaluated.",
            "",
            "Trained with",
            "",
            "```",
            command(arguments, lora),
            "```",
            "",
            *(_lines_for_peft(name, labels) if merged is None else []),
        ]
    )


def _lines_for_peft(name: str, labels: list[str] | None) -> list[str]:
    names = None if labels is None else dict(enumerate(labels))
    return [
        "PEFT loads it so, with the number of labels and their names:",
        "",
        "```python",
        "from peft import AutoPeftModelForSequenceClassification",
        "",
        "model = AutoPeftModelForSequenceClassification.from_pretrained(",
        f"    {json.dumps(name, ensure_ascii=False)},",
        f"    num_labels={1 if labels is None else len(labels)},",
        *([f"    id2label={names!r},"] if names else []),
        ")",
        "```",
        "",
    ]


def _listed(labels: list[str]) -> str:
    return ", ".join(labels[:20]) + (", ..." if labels[20:] else "")


def base_id(base: str) -> str | None:
    """The hub id of a base model, where it has a known one: a local directory would be refused by
    the Hub.
    """
    try:
        if Path(base) == packaged_model():
            return PACKAGED_MODEL
    except MiniloraError:
        pass
    return base if HUB_ID.fullmatch(base) and not Path(base).exists() else None


def command(arguments: dict[str, Any], lora: dict[str, Any]) -> str:
    """The command line of a run: every flag that is not at its default, files by their names."""
    given = {
        name: Path(value).name if name in PATHS and Path(value).exists() else value
        for name, value in _changed(TrainConfig(), arguments).items()
        if name not in NOT_SHOWN
    }
    given |= _changed(LoraConfig(**LORA_DEFAULTS), lora)
    words = ["python", "-m", "minilora.train"]
    for name, value in given.items():
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        else:
            words.append(json.dumps(value) if isinstance(value, (dict, bool)) else str(value))
    return shlex.join(words)


def _metadata(name: str, hub_id: str | None, metrics: dict[str, float], data: str) -> list[str]:
    lines = [f"base_model: {hub_id}"] if hub_id else []
    lines += ["library_name: peft", "pipeline_tag: text-classification", "tags:"]
    lines += [f"- base_model:adapter:{hub_id}"] if hub_id else []
    lines += ["- lora", "- minilora"]
    if not metrics:
        return lines
    lines += ["metrics:", *(f"- {metric}" for metric in metrics)]
    lines += ["model-index:", f"- name: {_yaml(name)}", "  results:", "  - task:"]
    lines += ["      type: text-classification", "    dataset:"]
    lines += [f"      type: {re.sub(r'[^A-Za-z0-9.-]', '-', data)}", f"      name: {_yaml(data)}"]
    lines += ["    metrics:"]
    for metric, value in metrics.items():
        lines += [
            f"    - type: {metric}",
            f"      value: {value:.6f}",
        ]  # not 1e-05, a string to YAML
    return lines


def _data_name(arguments: dict[str, Any]) -> str:
    file = arguments["validation_file"]
    if file is None and arguments["train_file"] is None:
        return "minilora's own sentences"
    if file is None:
        return f"a part of {Path(arguments['train_file']).name}"
    return Path(file).name


def _yaml(text: str) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return json.dumps(printable, ensure_ascii=False)


def _changed(default: TrainConfig | LoraConfig, values: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(default) if field.metadata.get("help")]
    return {
        name: values[name]
        for name in names
        if name in values and name not in BOOKKEEPING and values[name] != getattr(default, name)
    }
