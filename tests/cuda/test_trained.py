"""What a GPU trained, used on either device."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from minilora import (
    LoraConfig,
    TrainConfig,
    evaluate_file,
    fine_tune,
    open_run,
    predict_texts,
    write_merged_model,
)
from minilora.lora.peft_files import adapter_state_dict
from tests.conftest import read_rows
from tests.cuda import needs_cuda
from tests.trained.test_score import without_timings

pytestmark = needs_cuda
DTYPES = ["float32", "bfloat16", "float16"]
TEXTS = ["the film was good", "a book", "it was never very dull but they hated the long plot"]


@pytest.fixture(scope="module", params=DTYPES)
def run(request, tmp_path_factory, tiny_model, sentences):
    """A finished run's (directory, dtype)."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    config = TrainConfig(
        model_name_or_path=str(tiny_model),
        train_file=str(sentences[0]),
        validation_file=str(sentences[1]),
        output_dir=str(output_dir),
        max_steps=6,
        learning_rate=2e-2,
        dtype=request.param,
    )
    fine_tune(config, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    return output_dir, request.param


def last_evaluation(output_dir):
    return [row for row in read_rows(output_dir) if "eval_loss" in row][-1]


def test_evaluate_gives_trainings_numbers(run, sentences):
    """Bitwise where they were computed, to rounding on the CPU."""
    output_dir, dtype = run
    expected = without_timings(last_evaluation(output_dir))
    here = evaluate_file(open_run(output_dir, device="cuda"), sentences[1]).metrics
    assert without_timings(here) == expected
    there = evaluate_file(open_run(output_dir, device="cpu"), sentences[1]).metrics
    close = 1e-5 if dtype == "float32" else 3e-2
    assert there["eval_loss"] == pytest.approx(expected["eval_loss"], rel=close)


def test_predictions_are_the_same_on_both_devices(run):
    output_dir, dtype = run
    found = {
        device: list(predict_texts(open_run(output_dir, device=device), TEXTS))
        for device in ("cuda", "cpu")
    }
    for here, there in zip(found["cuda"], found["cpu"], strict=True):
        assert here["label"] == there["label"]
        close = 1e-5 if dtype == "float32" else 3e-2
        assert here["score"] == pytest.approx(there["score"], abs=close)


def test_the_adapter_is_loaded_bit_for_bit_on_both_devices(run):
    stored = load_file(run[0] / "adapter_model.safetensors")
    for device in ("cuda", "cpu"):
        loaded = adapter_state_dict(open_run(run[0], device=device).model)
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name].cpu(), stored[name]) for name in stored)


def test_the_merged_model_predicts_what_the_run_does(run, tmp_path):
    output_dir, dtype = run
    write_merged_model([output_dir], tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").to("cuda")
    opened = open_run(output_dir, device="cuda")
    for text, row in zip(TEXTS, predict_texts(opened, TEXTS), strict=True):
        with torch.no_grad():
            inputs = opened.tokenizer(text, return_tensors="pt").to("cuda")
            probabilities = model(**inputs).logits.softmax(-1)[0].tolist()
        close = 1e-4 if dtype == "float32" else 3e-2
        assert list(row["probabilities"].values()) == pytest.approx(probabilities, abs=close)


def test_the_record_says_what_it_ran_on(run):
    record = open_run(run[0]).record
    assert record.environment["cuda"] == torch.cuda.get_device_name()
    assert dataclasses.replace(record.arguments, device=None).dropout == "torch"
