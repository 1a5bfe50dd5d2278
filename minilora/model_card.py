"""The model card of a trained adapter: README.md, with the metadata that the Hub reads."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

from minilora.bert.load import PACKAGED_MODEL, packaged_model
from minilora.bert.tasks import Task, build_task
from minilora.errors import MiniloraError, harmless
from minilora.training.record import BASE_NAME, RunRecord

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
# Our metrics under the Hub's names.
METRICS = {
    "eval_accuracy": "accuracy",
    "eval_exact_match": "exact_match",
    "eval_precision": "precision",
    "eval_recall": "recall",
    "eval_f1": "f1",
    "eval_f1_micro": "f1",
    "eval_matthews": "matthews_correlation",
    "eval_perplexity": "perplexity",
    "eval_mse": "mse",
    "eval_pearson": "pearsonr",
    "eval_spearman": "spearmanr",
}


def model_card(name: str, base: str, merged: str | None, record: RunRecord) -> str:
    """The text of README.md for the adapter `name` of a finished run on `base`, a hub id or a
    directory. If an adapter was `merged` into that first, the base lies beside this one.
    """
    result, lora, labels = record.result or {}, record.lora, record.labels
    metrics = {hub: result[ours] for ours, hub in METRICS.items() if ours in result}
    arguments = record.arguments
    validation, train = arguments.validation_file, arguments.train_file or arguments.dataset_name
    held_out = "minilora's own sentences" if train is None else f"a part of {Path(train).name}"
    data = held_out if validation is None else Path(validation).name
    hub_id, task = base_id(base), build_task(record.arguments, labels)
    onto = f"`{hub_id or Path(base).name}`"
    if merged is not None:
        onto = f"`{BASE_NAME}`, a model with the adapter `{Path(merged).name}` merged into it"
    classes = ", ".join((labels or [])[:20]) + (", ..." if labels and labels[20:] else "")
    predicts = f"classes: {classes}" if labels else f"task: {record.arguments.task}"
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
    metadata = _metadata(name, None if merged else hub_id, task.pipeline_tag, data, metrics)
    paragraphs = [
        f"# {name}",
        f"A LoRA adapter (r={lora.r}, lora_alpha={lora.lora_alpha}) for {onto}; {predicts}.",
        f"On `{data}`: {scores}." if scores else "It was not evaluated.",
    ]
    shown = [harmless(" ".join(paragraph.split())) for paragraph in paragraphs]
    shown.append(_lines_for_peft(name, task))
    if merged is not None:
        moved = f"transformers loads `{name}/{BASE_NAME}`, and `PeftModel.from_pretrained` the rest"
        shown.append(f"So PEFT looks for the base where it was written. Once moved, {moved}.")
    return "\n\n".join([metadata, *shown]) + "\n"


def base_id(base: str) -> str | None:
    """The hub id of a base model, if it has one: the Hub would refuse a local directory."""
    with contextlib.suppress(MiniloraError):
        if Path(base) == packaged_model():
            return PACKAGED_MODEL
    return base if HUB_ID.fullmatch(base) and not Path(base).exists() else None


def _metadata(name: str, base: str | None, task: str, data: str, metrics: dict[str, float]) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # slow, and needed once in a run

    data_type = re.sub(r"[^A-Za-z0-9.-]", "-", data)
    results = [EvalResult(task, data_type, data, *metric) for metric in metrics.items()]
    metadata = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=task,
        tags=[*([f"base_model:adapter:{base}"] if base else []), "lora", "minilora"],
        metrics=list(metrics) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{metadata.to_yaml()}\n---"


def _lines_for_peft(name: str, task: Task) -> str:
    peft_class, how = "AutoPeftModel", ""
    if task.peft_task_type is not None:
        peft_class = task.auto_class.__name__.replace("AutoModel", "AutoPeftModel")
        labels = task.labels
        task.configure(config := SimpleNamespace())
        problem = getattr(config, "problem_type", None)  # of which transformers' pipeline asks
        names = "" if labels is None else f"\n    id2label={dict(enumerate(labels))!r},"
        names += "" if problem is None else f"\n    problem_type={problem!r},"
        how = f"\n    num_labels={1 if labels is None else len(labels)},{names}"
    return f"""PEFT loads it so{", with the number of labels and their names" if how else ""}:

```python
from peft import {peft_class}

model = {peft_class}.from_pretrained(
    {name!r},{how}
)
```"""
