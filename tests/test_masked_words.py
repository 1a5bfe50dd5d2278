"""A run of masked_lm, from its texts to what transformers and PEFT make of it."""

import json
import random
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, pipeline, set_seed

from minilora import (
    MiniloraError,
    adapter_state_dict,
    evaluate_file,
    latest_checkpoint,
    open_run,
    predict_texts,
    write_merged_model,
)
from minilora.fine_tuning import run_fine_tuning
from tests.conftest import WORDS, read_rows, tiny_config
from tests.training.test_resume import assert_same_run, stop_at

TEXTS = ["the [MASK] was good", "[MASK] loved the [MASK] and it was dull", "so [MASK]"]
LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def with_head(tmp_path_factory, tiny_model):
    """The tiny BERT's own class for masked words, its decoder tied to its embeddings."""
    directory = tmp_path_factory.mktemp("with-head") / "model"
    shutil.copytree(tiny_model, directory)
    set_seed(3)
    BertForMaskedLM(tiny_config(initializer_range=0.1)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory, found = tmp_path_factory.mktemp("texts"), []
    for name, count, seed in (("train.txt", 80, 1), ("validation.txt", 30, 2)):
        draw = random.Random(seed)
        lines = [
            f"the {draw.choice(WORDS)} was {draw.choice(WORDS)} and dull" for _ in range(count)
        ]
        (directory / name).write_text("\n".join(lines) + "\n")
        found.append(directory / name)
    return found


def arguments(model, files, **settings):
    return {
        "task": "masked_lm",
        "model_name_or_path": str(model),
        "train_file": str(files[0]),
        "validation_file": str(files[1]),
        "max_length": 24,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "device": "cpu",
        **settings,
    }


def run_to(output_dir, values, lora=LORA):
    run_fine_tuning({**values, "output_dir": str(output_dir)}, lora, lambda: False)
    return output_dir


@pytest.fixture(scope="module", params=["with a head", "without"])
def finished(request, tmp_path_factory, tiny_model, with_head, files):
    model = with_head if request.param == "with a head" else tiny_model
    return run_to(tmp_path_factory.mktemp("masked") / "out", arguments(model, files))


def test_what_is_trained_is_said(command, with_head, tiny_model, files, tmp_path):
    for name, model, new in (("a", with_head, "-"), ("b", tiny_model, "cls")):
        flags = [f"--{key}={value}" for key, value in arguments(model, files, max_steps=1).items()]
        done = command("train", *flags, "--output_dir", tmp_path / name)
        assert done.code == 0 and f"a BertForMaskedLM; new: {new}\n" in done.err
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["task_type"] is None and config["modules_to_save"] == (
            None if new == "-" else [new]
        )
        assert config["auto_mapping"]["base_model_class"] == "BertForMaskedLM"


def test_it_learns(finished):
    rows = [row for row in read_rows(finished) if "eval_loss" in row]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    for row in rows:
        assert row["eval_perplexity"] == pytest.approx(np.exp(row["eval_loss"]), rel=1e-5)


@pytest.mark.parametrize("step", [1, 4, 5, 7])
@pytest.mark.parametrize("by_line", [False, True])
def test_a_run_stopped_in_an_epoch_or_at_its_end_resumes_to_the_same_bits(
    step, by_line, with_head, files, tmp_path
):
    values = arguments(with_head, files, line_by_line=by_line, per_device_train_batch_size=7)
    values["gradient_accumulation_steps"] = 3 if by_line else 1
    whole = run_to(tmp_path / "whole", values, {})
    epochs = {row["epoch"] for row in read_rows(whole)}
    assert len([epoch for epoch in epochs if epoch % 1]) >= 3  # steps within an epoch
    stop_at(step, values, tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run").name == f"checkpoint-{step}"
    run_fine_tuning({"resume_from_checkpoint": str(tmp_path / "run")}, {}, lambda: False)
    assert_same_run(tmp_path / "run", whole)


def test_with_the_masks_of_another_epoch_the_resume_is_another_run(
    with_head, files, tmp_path, monkeypatch
):
    """The control of the test above."""
    from minilora.bert.tasks.masked_lm import MaskedLm

    values = arguments(with_head, files)
    whole = run_to(tmp_path / "whole", values, {})
    stop_at(4, values, tmp_path / "run")
    vary = MaskedLm.vary
    monkeypatch.setattr(
        MaskedLm, "vary", lambda self, examples, epoch: vary(self, examples, epoch and epoch + 1)
    )
    run_fine_tuning({"resume_from_checkpoint": str(tmp_path / "run")}, {}, lambda: False)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "change", [{"mlm_probability": 0.3}, {"line_by_line": True}, {"seed": 7}], ids=str
)
def test_what_the_masks_depend_on_cannot_change_on_a_resume(change, finished, command):
    (name, value), flags = next(iter(change.items())), ("--resume_from_checkpoint", finished)
    done = command("train", *flags, f"--{name}", value)
    assert done.code == 2 and f"{name}: " in done.err and f"-> {value}" in done.err


def test_evaluate_is_trainings_last_evaluation(finished, files, command):
    last = [row for row in read_rows(finished) if "eval_loss" in row][-1]
    found = command("evaluate", finished, "--file", files[1]).summary()
    for name in last.keys() - {"step", "epoch"}:
        assert found[name] == last[name], name


def test_peft_loads_the_adapter_with_the_same_logits(finished):
    run = open_run(finished)
    theirs = peft.AutoPeftModel.from_pretrained(finished).eval()
    inputs = run.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, run.model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved", [None, ["cls"]])
def test_an_adapter_of_pefts_is_opened_and_ours_has_its_keys(saved, with_head, tmp_path):
    base = AutoModelForMaskedLM.from_pretrained(with_head)
    set_seed(1)
    theirs = peft.get_peft_model(base, peft.LoraConfig(modules_to_save=saved, lora_dropout=0.1))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    run = open_run(tmp_path / "theirs")
    assert run.task.name == "masked_lm"
    inputs = AutoTokenizer.from_pretrained(with_head)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, run.model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert adapter_state_dict(run.model).keys() == stored.keys()


@pytest.mark.parametrize("targets", [None, ["query", "word_embeddings"]], ids=str)
@pytest.mark.parametrize("base", ["with a head", "without"])
def test_the_pipeline_over_the_merged_model_fills_as_predict_does(
    base, targets, with_head, tiny_model, files, tmp_path
):
    model = with_head if base == "with a head" else tiny_model
    values = arguments(model, files, learning_rate=3e-2, num_train_epochs=1)
    out = run_to(tmp_path / "out", values, {**LORA, "target_modules": targets})
    merged = write_merged_model([out], tmp_path / "merged")
    fill = pipeline("fill-mask", str(merged), device="cpu")
    for row, text in zip(predict_texts(open_run(out), TEXTS), TEXTS, strict=True):
        theirs = fill(text)
        theirs = theirs if isinstance(theirs[0], list) else [theirs]
        assert len(row["fills"]) == len(theirs) == text.count("[MASK]")
        for ours, expected in zip(row["fills"], theirs, strict=True):
            assert [c["token"] for c in ours["candidates"]] == [c["token_str"] for c in expected]
            scores = [c["score"] for c in ours["candidates"]]
            assert scores == pytest.approx([c["score"] for c in expected], abs=1e-5)
            assert text[ours["start"] : ours["end"]] == "[MASK]"


def test_combined_runs_have_the_mean_of_their_new_heads(tiny_model, files, tmp_path):
    """Its bias, tied within the head, included: what the model computes is what is saved."""
    out = run_to(tmp_path / "out", arguments(tiny_model, files, num_train_epochs=1), LORA)
    write_merged_model([out, out], tmp_path / "merged", weights=[0.5, 0.5])
    write_merged_model([out], tmp_path / "expected")
    inputs = AutoTokenizer.from_pretrained(tiny_model)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = (
            AutoModelForMaskedLM.from_pretrained(tmp_path / name).eval()(**inputs).logits
            for name in ("merged", "expected")
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_predict_fills_texts_files_and_a_stream(finished, tmp_path, command, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    done = command("predict", finished, "--file", tmp_path / "a.txt", "--merge=false")
    *rows, _ = [json.loads(line) for line in done.out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2] and list(rows[0]) == [
        "index",
        "fills",
        "text",
    ]
    assert list(rows[0]["fills"][0]) == ["token", "score", "start", "end", "candidates"]
    one = command("predict", finished, "--text", TEXTS[1], "--merge=false")
    one = json.loads(one.out.splitlines()[0])
    assert one["text"] == rows[1]["text"] and "[MASK]" not in one["text"]
    assert [fill["token"] for fill in one["fills"]] == [fill["token"] for fill in rows[1]["fills"]]


def test_a_line_without_a_mask_is_one_clear_error(finished, tmp_path, command):
    (tmp_path / "a.txt").write_text("the [MASK]\nthe film\n")
    done = command("predict", finished, "--file", tmp_path / "a.txt")
    assert done.code == 2 and "line 2: each text needs a [MASK]" in done.err
    done = command("predict", finished, "--text", "the film")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1


def test_packed_batches_come_to_the_same_as_padded(with_head, files, tmp_path):
    model = shutil.copytree(with_head, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps({**config, **still}))
    losses = []
    for batching in ("packed", "padded"):
        values = arguments(model, files, batching=batching, line_by_line=True)
        out = run_to(tmp_path / batching, values, {**LORA, "lora_dropout": 0.0})
        losses.append([row["loss"] for row in read_rows(out) if "loss" in row])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_parity_is_refused_in_one_line(command, with_head, files, tmp_path):
    flags = [f"--{key}={value}" for key, value in arguments(with_head, files).items()]
    done = command("train", *flags, "--hf_parity", "--output_dir", tmp_path / "out")
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1
    assert "hf_parity is for" in done.err and "not masked_lm" in done.err


def test_a_file_without_one_masked_token_is_no_evaluation(finished, tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(MiniloraError, match="no token was masked"):
        evaluate_file(open_run(finished), tmp_path / "a.txt")
