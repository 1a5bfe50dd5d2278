"""Whole runs of question answering, against HF Trainer, PEFT and transformers."""

import json
import random
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from minilora import TrainConfig, fine_tune, open_run, write_merged_model
from minilora.fine_tuning import run_fine_tuning
from minilora.lora.adapters import set_fused
from minilora.trained.score import evaluate_file
from tests.bert.tasks.test_question_answering import question, squad
from tests.conftest import read_rows

MAX_LENGTH, STRIDE = 32, 8
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    draw, directory = random.Random(5), tmp_path_factory.mktemp("questions")
    counts = {"train": 26, "validation": 11}
    return [
        squad(directory / f"{split}.json", [question(draw, n, 60) for n in range(count)])
        for split, count in counts.items()
    ]


def arguments(tiny_model, files, output_dir, **changes):
    return {
        "task": "question_answering",
        "model_name_or_path": str(tiny_model),
        "train_file": str(files[0]),
        "validation_file": str(files[1]),
        "output_dir": str(output_dir),
        "max_length": MAX_LENGTH,
        "doc_stride": STRIDE,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "device": "cpu",
        **changes,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, files):
    """A finished run with a checkpoint at each step."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    saves = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 2e-2}
    fine_tune(TrainConfig(**arguments(tiny_model, files, output_dir, **saves)))
    return output_dir


# HF Trainer as the oracle.


def features(path, tokenizer):
    """The windows of a file as a user of Trainer makes them, token by token."""
    found = []
    (article,) = json.loads(path.read_text())["data"]
    for paragraph in article["paragraphs"]:
        for row in paragraph["qas"]:
            encoded = tokenizer(
                row["question"], paragraph["context"], truncation="only_second",
                max_length=MAX_LENGTH, stride=STRIDE, return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )  # fmt: skip
            for window, offsets in enumerate(encoded["offset_mapping"]):
                owners, (start, end) = encoded.sequence_ids(window), (0, 0)
                for answer in row["answers"]:
                    first = answer["answer_start"]
                    last = first + len(answer["text"])
                    own = [t for t, owner in enumerate(owners) if owner == 1]
                    starts = [token for token in own if offsets[token][0] == first]
                    ends = [token for token in own if offsets[token][1] == last]
                    if starts and ends:
                        start, end = starts[0], ends[0]
                feature = {name: encoded[name][window] for name in tokenizer.model_input_names}
                found.append({**feature, "start_positions": start, "end_positions": end})
    return found


def trainer(tiny_model, files, output_dir, settings):
    settings = {"learning_rate": 3e-3, "num_train_epochs": 2, "logging_steps": 1, **settings}
    training = TrainingArguments(
        output_dir=str(output_dir), per_device_train_batch_size=8, per_device_eval_batch_size=32,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    set_seed(training.seed)
    model = AutoModelForQuestionAnswering.from_pretrained(tiny_model)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="QUESTION_ANS", **LORA))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    train, validation = (features(file, tokenizer) for file in files)
    collator = DataCollatorWithPadding(tokenizer)
    return Trainer(model, training, collator, train_dataset=train, eval_dataset=validation)


def compared(rows):
    rows = [{name: row[name] for name in COMPARED if name in row} for row in rows]
    return [row for row in rows if row.keys() & {"loss", "eval_loss"}]


@pytest.mark.parametrize(
    "settings",
    [{"eval_strategy": "epoch"}, {"gradient_accumulation_steps": 3, "eval_strategy": "no"}],
    ids=str,
)
def test_with_hf_parity_every_number_is_trainers(settings, tmp_path, tiny_model, files):
    theirs = trainer(tiny_model, files, tmp_path / "theirs", settings)
    theirs.train()
    settings = {"hf_parity": True, "save_strategy": "no", **settings}
    flags = arguments(tiny_model, files, tmp_path / "ours", **settings)
    found = run_fine_tuning(flags, LORA, lambda: False)
    expected = compared(theirs.state.log_history)
    assert expected and compared(found.log_history) == expected
    tensors = peft.get_peft_model_state_dict(theirs.model)
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in saved)


# One's own run.


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_stopped_run_is_resumed_bit_for_bit(batching, tmp_path, tiny_model, files):
    saves = {"save_strategy": "steps", "save_steps": 1, "batching": batching, "max_steps": 6}
    calls, results = iter([False] * 4 + [True]), []
    for name, stop in (("whole", lambda: False), ("out", lambda: next(calls))):
        flags = arguments(tiny_model, files, tmp_path / name, **saves)
        results.append(run_fine_tuning(flags, {}, stop))
    assert results[1].global_step == 4
    run_fine_tuning({"resume_from_checkpoint": str(tmp_path / "out")}, {}, lambda: False)
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "whole")
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_packed_runs_learn_what_padded_runs_do(tmp_path, tiny_model, files):
    losses = []
    for batching in ("packed", "padded"):
        flags = arguments(tiny_model, files, tmp_path / batching, batching=batching)
        result = run_fine_tuning(flags, {"lora_dropout": 0.0}, lambda: False)
        losses.append(
            [row[k] for row in result.log_history for k in ("loss", "eval_loss") if k in row]
        )
    # BERT's own dropout draws other masks.
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0][-1] < losses[0][0]


def test_an_evaluation_afterwards_gives_training_s_numbers(run, files):
    last = [row for row in read_rows(run) if "eval_loss" in row][-1]
    found = evaluate_file(open_run(run), files[1]).metrics
    names = ["loss", "exact_match", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"]
    assert [name for name in found if "per_second" not in name and "runtime" not in name] == [
        f"eval_{name}" for name in names
    ]
    assert {name: found[name] for name in last.keys() & found.keys()} == {
        name: last[name] for name in last if name.startswith("eval_")
    }


def batch_of(tokenizer):
    return tokenizer(
        ["who", "what is it"], ["the plot was good", "a film"], padding=True, return_tensors="pt"
    )


def logits_of(model, tokenizer):
    with torch.no_grad():
        found = model(**batch_of(tokenizer))
    return torch.stack([found.start_logits, found.end_logits])


def test_peft_loads_the_adapter_with_the_same_logits(run, tiny_model):
    opened = open_run(run)
    base = AutoModelForQuestionAnswering.from_pretrained(tiny_model)
    theirs = peft.PeftModel.from_pretrained(base, run).eval()
    assert type(theirs) is peft.PeftModelForQuestionAnswering
    set_fused(opened.model, False)  # PEFT's order of operations
    theirs = theirs.get_base_model()  # PEFT's own forward leaves out token_type_ids
    assert torch.equal(
        logits_of(opened.model, opened.tokenizer), logits_of(theirs, opened.tokenizer)
    )


def test_a_merged_model_is_transformers_own(run, tmp_path):
    opened, directory = open_run(run), write_merged_model([run], tmp_path / "merged")
    model = AutoModelForQuestionAnswering.from_pretrained(directory).eval()
    expected = logits_of(opened.model, opened.tokenizer)
    found = logits_of(model, AutoTokenizer.from_pretrained(directory))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert model.config.id2label == {0: "start or none", 1: "end or none"}


def test_the_commands_predict_from_a_file_and_from_the_flags(run, files, tmp_path, command):
    result = command("predict", run, "--file", files[1], "--output", tmp_path / "p.jsonl")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [(row["index"], row["id"]) for row in rows] == [(n, f"q{n}") for n in range(11)]
    flags = ("--text", "who", "--text_pair", "the plot was good")
    row = json.loads(command("predict", run, *flags).out.splitlines()[0])
    assert list(row) == ["index", "answer", "score", "start", "end", "answers"]
    assert row["answer"] == "the plot was good"[row["start"] : row["end"]]
    result = command("predict", run, "--text", "who")
    assert result.code == 2 and "no second text" in result.err


def test_a_foreign_adapter_of_answers_is_opened(run, tiny_model, tmp_path):
    base = AutoModelForQuestionAnswering.from_pretrained(tiny_model)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="QUESTION_ANS"))
    theirs.save_pretrained(tmp_path / "theirs")
    opened = open_run(tmp_path / "theirs", model_name_or_path=str(tiny_model))
    assert opened.task.name == "question_answering"


def test_the_example_s_questions_can_be_trained_on(tmp_path, tiny_model):
    example = Path(__file__).parent.parent / "examples" / "data" / "questions.json"
    flags = arguments(tiny_model, [example, example], tmp_path / "out", max_steps=1)
    opened = open_run(fine_tune(TrainConfig(**flags)).output_dir)
    rows = list(opened.task.read_rows(example, opened.record.arguments, True))
    assert (len(rows), sum(not row.label for row in rows)) == (34, 6)
    assert opened.record.labels == ["start or none", "end or none"]
