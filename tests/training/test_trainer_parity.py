"""HF Trainer + PEFT as the oracle of the loop: with hf_parity, the same bits at every step.

Both run from the same files, in Trainer's reference order: set_seed, from_pretrained, get_peft_model, Trainer, train.
Compared are every logged loss, gradient norm and learning rate, every evaluation's loss, and the final tensors.
"""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from minilora.fine_tuning import run_fine_tuning

BATCH = 8
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")


class Sentences(torch.utils.data.Dataset):
    """The rows of a tsv with a header, as a Trainer user would feed them."""

    def __init__(self, path: Path, tokenizer) -> None:
        rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        self.labels = [["negative", "positive"].index(label) for _, label in rows]
        self.encoded = tokenizer([text for text, _ in rows], truncation=True)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {k: v[index] for k, v in self.encoded.items()} | {"label": self.labels[index]}


class StopAfter(TrainerCallback):
    """Ends training after a step, checkpoint included, as if the process had been stopped there."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = control.should_save = True


def trainer(model_dir, sentences, output_dir, settings, lora=LORA, stop_after=None):
    settings = {"learning_rate": 3e-3, "num_train_epochs": 2, "logging_steps": 1, **settings}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.pop("per_device_train_batch_size", BATCH),
        per_device_eval_batch_size=32,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )
    set_seed(arguments.seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
    model = get_peft_model(model, PeftConfig(task_type="SEQ_CLS", **lora))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return Trainer(
        model,
        arguments,
        train_dataset=Sentences(sentences[0], tokenizer),
        eval_dataset=Sentences(sentences[1], tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[] if stop_after is None else [StopAfter(stop_after)],
    )


def our_arguments(model_dir, sentences, settings) -> dict:
    return {
        "model_name_or_path": str(model_dir),
        "train_file": str(sentences[0]),
        "validation_file": str(sentences[1]),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "hf_parity": True,
        "device": "cpu",
        **settings,
    }


def ours(model_dir, sentences, output_dir, settings, lora=LORA, stop_after=None):
    arguments = our_arguments(model_dir, sentences, settings)
    calls = iter(range(10_000))
    stop = (lambda: False) if stop_after is None else (lambda: next(calls) >= stop_after)
    return run_fine_tuning({**arguments, "output_dir": str(output_dir)}, lora, stop)


def compared(rows) -> list[dict]:
    rows = [{k: row[k] for k in COMPARED if k in row} for row in rows]
    return [row for row in rows if set(row) & {"loss", "eval_loss"}]


def peft_tensors(model) -> dict:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def assert_same_tensors(expected: dict, found: dict) -> None:
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


RUNS = {
    "ragged lengths and a ragged last batch": {},
    "three epochs": {"num_train_epochs": 3},
    "other seed": {"seed": 7},
    "data_seed": {"data_seed": 11},
    "cosine with warmup": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "constant": {"lr_scheduler_type": "constant"},
    "constant with a share of warmup": {
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.3,
    },
    "weight decay and betas": {"weight_decay": 0.1, "adam_beta2": 0.98},
    "no clipping": {"max_grad_norm": 0.0},
    "tight clipping": {"max_grad_norm": 0.01},
    "accumulation 2": {"gradient_accumulation_steps": 2},
    "accumulation 4 with a ragged end": {"gradient_accumulation_steps": 4, "num_train_epochs": 3},
    "evaluation every 2 steps": {"eval_strategy": "steps", "eval_steps": 2},
    "evaluation each epoch": {"eval_strategy": "epoch"},
    "max_steps inside an epoch": {"max_steps": 8},
    "means of three steps": {"logging_steps": 3},
    "batch of 5": {"per_device_train_batch_size": 5},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_every_number_of_a_run_is_trainers(settings, tmp_path, tiny_model, sentences):
    theirs = trainer(tiny_model, sentences, tmp_path / "theirs", dict(settings))
    theirs.train()
    result = ours(tiny_model, sentences, tmp_path / "ours", settings)
    expected = compared(theirs.state.log_history)
    assert expected and compared(result.log_history) == expected
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert_same_tensors(peft_tensors(theirs.model), found)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {
            "target_modules": ["query", "key", "value", "attention.output.dense"],
            "lora_dropout": 0.1,
        },
        {"bias": "all"},
        {"use_dora": True, "lora_dropout": 0.1},
        {"use_rslora": True, "modules_to_save": ["pooler"]},
    ],
    ids=str,
)
def test_every_number_is_trainers_for_other_adapters(lora, tmp_path, tiny_model, sentences):
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **lora}
    theirs = trainer(tiny_model, sentences, tmp_path / "theirs", {}, lora)
    theirs.train()
    result = ours(tiny_model, sentences, tmp_path / "ours", {}, lora)
    assert compared(result.log_history) == compared(theirs.state.log_history)


def test_without_parity_the_run_is_another(tmp_path, tiny_model, sentences):
    """Negative control: the comparison notices one draw more or less per epoch."""
    theirs = trainer(tiny_model, sentences, tmp_path / "theirs", {})
    theirs.train()
    result = ours(tiny_model, sentences, tmp_path / "ours", {"hf_parity": False})
    assert compared(result.log_history) != compared(theirs.state.log_history)
