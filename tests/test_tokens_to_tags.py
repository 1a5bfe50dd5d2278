"""A run of a task that labels tokens, from its files to what transformers and PEFT make of it."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForTokenClassification, get_peft_model
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from minilora import evaluate_file, open_run, predict_texts, write_merged_model
from minilora.fine_tuning import run_fine_tuning
from tests.conftest import POSITIVE, WORDS, read_rows
from tests.training.test_trainer_parity import assert_same_tensors, compared, peft_tensors

TASK = "token_classification"
LABELS = ["B-good", "B-thing", "I-thing", "O"]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def write_tagged(path, count, seed):
    """Things, with the word that comes next, and words that praise."""
    draw, lines, things = random.Random(seed), [], ("film", "book", "plot", "story", "cast")
    for _ in range(count):
        before = ""
        for word in draw.choices(WORDS, k=draw.randint(2, 12)):
            tag = "I-thing" if before in things else "O"
            tag = "B-thing" if word in things else "B-good" if word in POSITIVE else tag
            lines.append(f"{word}\t{tag}")
            before = word
        lines.append("")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tagged")
    return (
        write_tagged(directory / "train.conll", 120, 1),
        write_tagged(directory / "validation.conll", 20, 2),
    )


def arguments(model, files, **settings):
    return {
        "task": TASK,
        "model_name_or_path": str(model),
        "train_file": str(files[0]),
        "validation_file": str(files[1]),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "device": "cpu",
        **settings,
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, files):
    output_dir = tmp_path_factory.mktemp("tokens") / "out"
    settings = {"num_train_epochs": 8, "save_strategy": "steps", "save_steps": 20}
    lora = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"}
    run_fine_tuning(
        arguments(tiny_model, files, output_dir=str(output_dir), **settings), lora, lambda: False
    )
    return output_dir


class Tagged(torch.utils.data.Dataset):
    """The sentences of a CoNLL file as transformers' run_ner feeds them."""

    def __init__(self, path, tokenizer):
        self.items = []
        for sentence in path.read_text().strip("\n").split("\n\n"):
            words, tags = zip(*(line.split("\t") for line in sentence.splitlines()), strict=True)
            encoded = tokenizer(list(words), is_split_into_words=True, truncation=True)
            labels, before = [], None
            for word in encoded.word_ids():
                is_first = word is not None and word != before
                labels.append(LABELS.index(tags[word]) if is_first else -100)
                before = word
            self.items.append({**encoded, "labels": labels})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "epoch"},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1, "eval_strategy": "epoch"},
    ],
    ids=str,
)
def test_with_parity_every_number_is_trainers(settings, tmp_path, tiny_model, files):
    run = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        learning_rate=1e-2,
        num_train_epochs=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    set_seed(run.seed)
    model = AutoModelForTokenClassification.from_pretrained(tiny_model, num_labels=4)
    model = get_peft_model(model, PeftConfig(task_type="TOKEN_CLS", **LORA))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    collator = DataCollatorForTokenClassification(tokenizer)
    data = [Tagged(file, tokenizer) for file in files]
    theirs = Trainer(
        model, run, train_dataset=data[0], eval_dataset=data[1], data_collator=collator
    )
    theirs.train()
    own = {"eval_strategy": "no", "save_strategy": "no", **settings, "hf_parity": True}
    given = arguments(tiny_model, files, output_dir=str(tmp_path / "ours"), **own)
    result = run_fine_tuning(given, LORA, lambda: False)
    expected = compared(theirs.state.log_history)
    assert expected and compared(result.log_history) == expected
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert_same_tensors(peft_tensors(theirs.model), found)


def test_it_learns_and_says_so_by_seqevals_names(finished):
    rows = [row for row in read_rows(finished) if "eval_loss" in row]
    assert rows[-1]["eval_f1"] > 0.6
    assert {"eval_precision", "eval_recall", "eval_accuracy"} < rows[-1].keys()


@pytest.mark.parametrize("step", [20, 60])
def test_a_resume_is_the_uninterrupted_run(step, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for checkpoint in out.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    resumed = tmp_path / "resumed"
    flags = {"resume_from_checkpoint": str(out / f"checkpoint-{step}"), "output_dir": str(resumed)}
    run_fine_tuning(flags, {}, lambda: False)
    assert read_rows(resumed) == read_rows(finished)
    found = load_file(resumed / "adapter_model.safetensors")
    assert_same_tensors(load_file(finished / "adapter_model.safetensors"), found)


def test_whether_all_sub_tokens_are_labelled_cannot_change_on_a_resume(finished, command):
    flags = ("--resume_from_checkpoint", finished, "--label_all_tokens")
    found = command("train", *flags)
    assert found.code == 2 and "label_all_tokens: False -> True" in found.err


def test_evaluate_is_trainings_last_evaluation_and_by_class(finished, files, command):
    last = [row for row in read_rows(finished) if "eval_loss" in row][-1]
    done = command("evaluate", finished, "--file", files[1])
    found = done.summary()
    for name in last.keys() - {"step", "epoch"}:
        assert found[name] == last[name], name
    assert list(found["per_class"]) == ["good", "thing"] and "support" in done.out


def test_peft_loads_the_adapter_with_the_same_logits(finished):
    run = open_run(finished)
    theirs = AutoPeftModelForTokenClassification.from_pretrained(finished, num_labels=4).eval()
    inputs = run.tokenizer(["we loved the film", "so dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, run.model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_transformers_pipeline_finds_the_entities_that_predict_finds(finished, tmp_path):
    """A merged model, by the strategy "first": one word, one tag."""
    texts = ["we loved the film, so long", "the book and the film!", "loved it.", "it was dull"]
    merged = write_merged_model([finished], tmp_path / "merged")
    theirs = pipeline(
        "token-classification", str(merged), aggregation_strategy="first", device="cpu"
    )
    count = 0
    for ours, text in zip(predict_texts(open_run(finished), texts), texts, strict=True):
        expected = [(e["entity_group"], e["start"], e["end"]) for e in theirs(text)]
        assert [(e["label"], e["start"], e["end"]) for e in ours["entities"]] == expected
        scores = [entity["score"] for entity in ours["entities"]]
        assert scores == pytest.approx([e["score"] for e in theirs(text)], abs=1e-4)
        count += len(expected)
    assert count >= 3


def test_predict_takes_tokens_texts_and_a_stream(finished, files, tmp_path, command):
    done = command("predict", finished, "--file", files[1], "--output", tmp_path / "p.jsonl")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and all(len(row["tags"]) == len(row["tokens"]) for row in rows)
    done = command("predict", finished, "--text", "we loved the film")
    found = json.loads(done.out.splitlines()[0])
    assert found["index"] == 0 and "tags" not in found and found["entities"]


def test_a_matrix_that_there_is_not_is_said(finished, files, command):
    done = command("evaluate", finished, "--file", files[1], "--confusion_matrix")
    assert done.code == 0 and "confusion_matrix" not in done.summary()
    assert "warning: no confusion matrix: token_classification gives" in done.err


def test_evaluate_file_refuses_a_tag_of_no_training(finished, tmp_path):
    from minilora import MiniloraError

    (tmp_path / "odd.conll").write_text("film\tB-animal\n")
    with pytest.raises(MiniloraError, match="odd.conll, line 1: token 1, 'film'"):
        evaluate_file(open_run(finished), tmp_path / "odd.conll")


def test_packed_batches_come_to_the_same_as_padded(tmp_path, tiny_model, files):
    losses = []
    for batching in ("packed", "padded"):
        settings = {"batching": batching, "output_dir": str(tmp_path / batching)}
        lora = {**LORA, "lora_dropout": 0.0}
        model = tmp_path / f"model-{batching}"
        shutil.copytree(tiny_model, model)
        config = json.loads((model / "config.json").read_text())
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (model / "config.json").write_text(json.dumps({**config, **still}))
        result = run_fine_tuning(arguments(model, files, **settings), lora, lambda: False)
        losses.append([row["loss"] for row in result.log_history if "loss" in row])
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_the_packaged_sentences_have_no_tags(command, tmp_path):
    done = command("train", "--task", TASK, "--output_dir", tmp_path / "out")
    assert done.code == 2 and "give --train_file" in done.err
