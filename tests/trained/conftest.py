"""What the tests of trained/ share."""

import peft
import pytest
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments


@pytest.fixture(scope="session")
def trainers(tmp_path_factory, tiny_model):
    """A checkpoint that HF Trainer wrote for a PEFT model."""
    directory = tmp_path_factory.mktemp("trainers")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
    rows = [
        {"input_ids": [2, 7, 8, 3], "attention_mask": [1] * 4, "labels": i % 2} for i in range(8)
    ]
    arguments = TrainingArguments(
        str(directory),
        max_steps=2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=7,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    return directory / "checkpoint-2"
