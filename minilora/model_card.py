"""The model card of a trained adapter: README.md, with the metadata that the Hub reads."""

import re
from pathlib import Path

from minilora.bert.load import PACKAGED_MODEL, packaged_model
from minilora.bert.tasks import task_class
from minilora.errors import MiniloraError
from minilora.training.config import TrainConfig
from minilora.training.record import RunRecord

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


def model_card(name: str, base: str, merged: str | None, record: RunRecord) -> str:
    """The text of README.md.

    Args:
        name: of the adapter, usually its directory's.
        base: where the base model was loaded from, a hub id or a directory.
        merged: the adapter that was merged into the base first, if one was. What was trained then
            fits no model that has a name, and no lines for PEFT are given.
        record: of the finished run, its result included.
    """
    result, lora, labels = record.result or {}, record.lora, record.labels
    metrics = {hub: result[ours] for ours, hub in METRICS.items() if ours in result}
    hub_id, data = base_id(base), _data_name(record.arguments)

    onto = f"`{hub_id or Path(base).name}`"
    if merged is not None:
        onto += f" with the adapter `{Path(merged).name}` merged into it"
    classes = ", ".join((labels or [])[:20]) + (", ..." if labels and labels[20:] else "")
    predicts = "it predicts a number" if labels is None else f"classes: {classes}"
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
    paragraphs = [
        _metadata(name, hub_id if merged is None else None, metrics, record),
        f"# {name}",
        f"A LoRA adapter (r={lora.r}, lora_alpha={lora.lora_alpha}) for {onto}; {predicts}.",
        f"On `{data}`: {scores}." if scores else "It was not evaluated.",
        *([_lines_for_peft(name, record)] if merged is None else []),
    ]
    return "\n\n".join(paragraphs) + "\n"


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


def _metadata(name: str, hub_id: str | None, metrics: dict[str, float], record: RunRecord) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # slow, and needed once in a run

    task, data = task_class(record.arguments.task).pipeline_tag, _data_name(record.arguments)
    data_type = re.sub(r"[^A-Za-z0-9.-]", "-", data)
    results = [EvalResult(task, data_type, data, *metric) for metric in metrics.items()]
    metadata = ModelCardData(
        base_model=hub_id,
        library_name="peft",
        pipeline_tag=task,
        tags=[*([f"base_model:adapter:{hub_id}"] if hub_id else []), "lora", "minilora"],
        metrics=list(metrics) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{metadata.to_yaml()}\n---"


def _lines_for_peft(name: str, record: RunRecord) -> str:
    auto_class = task_class(record.arguments.task).auto_class.__name__
    peft_class = auto_class.replace("AutoModel", "AutoPeftModel")
    labels = record.labels
    names = "" if labels is None else f"\n    id2label={dict(enumerate(labels))!r},"
    return f"""PEFT loads it so, with the number of labels and their names:

```python
from peft import {peft_class}

model = {peft_class}.from_pretrained(
    {name!r},
    num_labels={1 if labels is None else len(labels)},{names}
)
```"""


def _data_name(arguments: TrainConfig) -> str:
    if arguments.validation_file is not None:
        return Path(arguments.validation_file).name
    if arguments.train_file is None:
        return "minilora's own sentences"
    return f"a part of {Path(arguments.train_file).name}"
