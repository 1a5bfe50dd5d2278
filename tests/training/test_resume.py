"""A resumed run is the uninterrupted run, bit for bit.

Two ways to be stopped, both in a process of its own: SIGTERM, after which the run saves and says
so, and SIGKILL, after which it cannot. Negative controls drop one part of a checkpoint at a time
and must see the comparison fail.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minilora import (
    LoraConfig,
    MiniloraError,
    TrainConfig,
    Training,
    add_adapter,
    fine_tune,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    trainable_parameters,
)
from minilora.fine_tuning import run_fine_tuning
from minilora.training import checkpoint as checkpoint_room
from minilora.training import resume as resume_room
from minilora.training.checkpoint import read_checkpoint
from minilora.training.record import RunRecord, environment
from tests.conftest import read_rows

EPOCHS, STEPS_PER_EPOCH = 2, 6  # 44 sentences in batches of 8
STEPS = EPOCHS * STEPS_PER_EPOCH


def arguments(tiny_model, sentences, **changes) -> dict:
    train_file, validation_file = sentences
    return {
        "model_name_or_path": str(tiny_model),
        "train_file": str(train_file),
        "validation_file": str(validation_file),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "device": "cpu",
        **changes,
    }


def command(values: dict) -> list[str]:
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "minilora.train", *flags]


def final_tensors(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "adapter_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert read_rows(one) == read_rows(other)
    tensors, others = final_tensors(one), final_tensors(other)
    assert tensors.keys() == others.keys()
    for name in tensors:
        assert torch.equal(tensors[name], others[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, sentences) -> Path:
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    fine_tune(TrainConfig(**arguments(tiny_model, sentences), output_dir=str(output_dir)))
    return output_dir


def stop_at(step: int, values: dict, output_dir: Path) -> None:
    """Run in this process and stop before step `step` + 1, as a signal would."""
    calls = iter(range(1, 1000))
    run_fine_tuning({**values, "output_dir": str(output_dir)}, {}, lambda: next(calls) > step)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_stopped_at_any_step_resumes_to_the_same_bits(
    step, tmp_path, tiny_model, sentences, uninterrupted
):
    """Stopping by request at step k, checkpointing only then, and resuming changes nothing."""
    values = arguments(tiny_model, sentences, save_steps=1000)
    stop_at(step, values, tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / f"checkpoint-{step}"
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_resume_leaves_no_trace_where_paths_were_relative(
    tmp_path, tiny_model, sentences, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "base")
    values = arguments("base", sentences, metric_for_best_model="loss", max_steps=4)
    values |= {"eval_strategy": "steps", "eval_steps": 1}
    stop_at(STEPS, values, Path("run"))
    Path("run").rename("whole")
    stop_at(2, values, Path("run"))
    fine_tune(TrainConfig(resume_from_checkpoint="run"))
    last = Path("checkpoint-4")
    config, state = last / "adapter_config.json", last / "trainer_state.json"
    assert ("run" / config).read_bytes() == ("whole" / config).read_bytes()
    states = [json.loads((run / state).read_text()) for run in (Path("run"), Path("whole"))]
    for one in states:
        del one["log_history"]  # the times of its evaluations
    assert states[0] == states[1] and states[0]["best_model_checkpoint"]


def test_a_resume_is_noted_in_run_json_and_leaves_no_trace_in_a_checkpoint(
    tmp_path, tiny_model, sentences, uninterrupted
):
    run = tmp_path / "run"
    stop_at(2, arguments(tiny_model, sentences), run)
    stop_at(1, {"resume_from_checkpoint": str(run)}, run)
    fine_tune(TrainConfig(resume_from_checkpoint=str(run)))
    assert RunRecord.read(run).resumed == [2, 3] and RunRecord.read(uninterrupted).resumed == []
    for number in range(4, STEPS_PER_EPOCH):  # before an evaluation, whose time is in the log
        for file in (uninterrupted / f"checkpoint-{number}").iterdir():
            assert (run / f"checkpoint-{number}" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_killed_in_one_process_resumes_in_another_to_the_same_bits(
    step, tmp_path, tiny_model, sentences, uninterrupted
):
    """SIGKILL once checkpoint k exists; the next process is told nothing but the directory."""
    output_dir = tmp_path / "run"
    values = arguments(tiny_model, sentences, output_dir=output_dir)
    process = subprocess.Popen(
        command(values), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (output_dir / f"checkpoint-{step}").exists():
        assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    # The kill may have come a step or two late; go back to exactly step k.
    resume_from = output_dir / f"checkpoint-{step}"
    subprocess.run(
        command({"resume_from_checkpoint": resume_from}), check=True, capture_output=True
    )
    assert_same_run(output_dir, uninterrupted)
    assert not [p for p in output_dir.iterdir() if p.name.startswith((".tmp-", ".trash-"))]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_resumed_command_ends_in_the_same_bits(
    number, code, tmp_path, tiny_model, sentences, uninterrupted
):
    """The command finishes its step, saves, exits 128 + n, and resumes by its directory alone."""
    output_dir = tmp_path / "run"
    values = arguments(tiny_model, sentences, output_dir=output_dir, save_steps=1000)
    process = subprocess.Popen(
        command(values), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    metrics = output_dir / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert json.loads(printed.splitlines()[-1])["output_dir"] == str(output_dir)
    assert latest_checkpoint(output_dir) is not None
    subprocess.run(command({"resume_from_checkpoint": output_dir}), check=True, capture_output=True)
    assert_same_run(output_dir, uninterrupted)


def test_evaluation_changes_no_training_number(tmp_path, tiny_model, sentences, uninterrupted):
    """A run that evaluates every second step has the losses and tensors of one that does so per
    epoch.
    """
    values = arguments(tiny_model, sentences, eval_strategy="steps", eval_steps=2)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "run")))
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert losses == [row["loss"] for row in read_rows(uninterrupted) if "loss" in row]
    ours, theirs = final_tensors(tmp_path / "run"), final_tensors(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_resume_is_exact_with_accumulation_and_sums_that_span_it(
    accumulation, tmp_path, tiny_model, sentences
):
    """The loss mean of a row that began before the stop is the uninterrupted one."""
    values = arguments(
        tiny_model,
        sentences,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=5,
        logging_steps=3,
        num_train_epochs=3,
        lr_scheduler_type="cosine",
        warmup_steps=0.2,
        save_steps=1000,
    )
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    stop_at(4, values, tmp_path / "run")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path, tiny_model, sentences):
    """No file changes, but for the times in run.json; a missing final file is written again."""
    values = arguments(tiny_model, sentences, max_steps=4)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "run")))
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    result = fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    after = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    assert result.global_step == 4
    changed = {p.name for p in before | after if before.get(p) != after.get(p)}
    assert changed <= {"run.json"}


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    tmp_path, tiny_model, sentences, uninterrupted
):
    """run.json alone is enough."""
    stop_at(0, arguments(tiny_model, sentences, save_steps=1000), tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run") is None
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "mode",
    [
        {"dtype": "bfloat16"},
        {"dropout": "torch"},
        {"batching": "padded"},
        {"batching": "padded", "dropout": "torch", "dtype": "bfloat16"},
        {"gradient_checkpointing": True, "dtype": "bfloat16"},
        {"gradient_checkpointing": True, "batching": "padded"},
    ],
    ids=lambda mode: ", ".join(f"{name} {value}" for name, value in mode.items()),
)
def test_a_resume_is_exact_in_every_mode(mode, tmp_path, tiny_model, sentences):
    values = arguments(tiny_model, sentences, save_steps=1000, **mode)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    stop_at(4, values, tmp_path / "run")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("changed", [True, False], ids=["begun", "ended"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("dropout", ["fast", "torch"])
def test_a_run_out_of_memory_goes_on_with_recomputed_activations_to_the_same_bits(
    dropout, batching, changed, tmp_path, tiny_model, sentences
):
    """And one that has room again without them."""
    values = arguments(
        tiny_model, sentences, save_steps=1000, dropout=dropout, batching=batching,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    stop_at(2, {**values, "gradient_checkpointing": not changed}, tmp_path / "run")
    again = {"resume_from_checkpoint": str(tmp_path / "run"), "gradient_checkpointing": changed}
    fine_tune(TrainConfig(**again))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


RATES = {"head_learning_rate": 3e-4, "loraplus_lr_ratio": 8.0}


@pytest.mark.parametrize("names", [["head_learning_rate"], ["loraplus_lr_ratio"], [*RATES]])
def test_a_resume_with_several_learning_rates_is_exact_and_trainers_cannot_is_said_once(
    names, tmp_path, tiny_model, sentences, capfd
):
    values = arguments(tiny_model, sentences, **{name: RATES[name] for name in names})
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    said = capfd.readouterr().err
    count = {1: 4, 2: 6}[len(names)]
    line = f"optimizer.pt has {count} groups, HF Trainer's has 2: it cannot resume from it"
    assert said.count(line) == 1
    stop_at(STEPS_PER_EPOCH + 2, values, tmp_path / "run")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(MiniloraError, match=f"cannot change {names[0]}"):
        again = {"resume_from_checkpoint": str(tmp_path / "run"), names[0]: 100.0}
        fine_tune(TrainConfig(**again))


def rng(stored):
    stored.parts["rng_state.pth"]["cpu"] = torch.Generator().manual_seed(1).get_state()


def masks(stored):
    del stored.parts["rng_state.pth"]["mask_stream"]


def moments(stored):
    for values in stored.parts["optimizer.pt"]["state"].values():
        values["exp_avg"].zero_()


def schedule(stored):
    stored.parts["scheduler.pt"]["last_epoch"] = 0


def one_tensor(stored):
    tensors = stored.adapter.tensors
    tensors[min(tensors)].zero_()


def position(stored):
    # Both, for a position that does not fit the number of steps is refused.
    stored.manifest.state["step_in_epoch"] -= 1
    stored.manifest.state["global_step"] -= 1


def loss_sum(stored):
    stored.manifest.state["loss_sum"] = 0.0


@pytest.mark.parametrize(
    "change",
    [rng, masks, moments, schedule, one_tensor, position, loss_sum],
    ids=lambda c: c.__name__,
)
def test_without_any_one_part_the_resume_is_another_run(
    change, tmp_path, monkeypatch, tiny_model, sentences
):
    """Negative control: each part of a checkpoint is needed, and the comparison sees its loss."""
    # Fast dropout draws from its own stream, and nothing else in a step draws at all.
    dropout = "torch" if change is rng else "fast"
    values = arguments(tiny_model, sentences, save_steps=1000, logging_steps=3, dropout=dropout)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    stop_at(8, values, tmp_path / "run")

    def read_and_change(path):
        stored = read_checkpoint(path)
        change(stored)
        return stored

    monkeypatch.setattr(checkpoint_room, "read_checkpoint", read_and_change)
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_resume_of_a_compiled_run_says_that_it_may_not_be_exact(tmp_path):
    """What is compiled depends on the shapes that came first."""
    found = {}
    for compiled in (True, False):
        config = TrainConfig(torch_compile=compiled)
        record = RunRecord(config, LoraConfig(), None, False, {}, "toy", environment())
        path = save_checkpoint(tmp_path / str(compiled), own_loop(), run=record)
        found[compiled] = resume_room.plan_resume(path).warnings
    (warning,) = found[True]
    assert "torch_compile chooses kernels anew" in warning and found[False] == []


def test_the_run_depends_on_its_seed(tmp_path, tiny_model, sentences, uninterrupted):
    """Negative control: another seed gives another run."""
    values = arguments(tiny_model, sentences, seed=7)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "run")))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-4},
        {"per_device_train_batch_size": 4},
        {"seed": 1},
        {"lr_scheduler_type": "cosine"},
        {"max_steps": 100},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_an_argument_that_would_bend_the_run_is_refused(change, tmp_path, tiny_model, sentences):
    """The error lists old -> new, and the run can still be resumed without it."""
    values = arguments(tiny_model, sentences, save_steps=1000)
    stop_at(3, values, tmp_path / "run")
    ((name, new),) = change.items()
    with pytest.raises(MiniloraError, match=f"{name}: .* -> {new}"):
        run_fine_tuning(
            {"resume_from_checkpoint": str(tmp_path / "run"), **change}, {}, lambda: True
        )
    assert latest_checkpoint(tmp_path / "run") is not None


def test_a_lora_argument_that_would_bend_the_run_is_refused(tmp_path, tiny_model, sentences):
    stop_at(3, arguments(tiny_model, sentences, save_steps=1000), tmp_path / "run")
    with pytest.raises(MiniloraError, match="r: 8 -> 4"):
        run_fine_tuning({"resume_from_checkpoint": str(tmp_path / "run")}, {"r": 4}, lambda: True)


def test_harmless_arguments_apply_to_a_resume(tmp_path, tiny_model, sentences, uninterrupted):
    """More frequent checkpoints and rotation change no number."""
    stop_at(5, arguments(tiny_model, sentences, save_steps=1000), tmp_path / "run")
    fine_tune(
        TrainConfig(resume_from_checkpoint=str(tmp_path / "run"), save_steps=2, save_total_limit=2)
    )
    assert_same_run(tmp_path / "run", uninterrupted)
    kept = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-12"]


def test_a_changed_data_file_is_refused(tmp_path, tiny_model, sentences):
    """The same path with other bytes is another data set."""
    train_file = tmp_path / "train.tsv"
    train_file.write_bytes(sentences[0].read_bytes())
    values = arguments(tiny_model, (train_file, sentences[1]), save_steps=1000)
    stop_at(3, values, tmp_path / "run")
    train_file.write_text(train_file.read_text() + "it was good\tpositive\n")
    with pytest.raises(MiniloraError, match=r"train file .*train\.tsv"):
        fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))


def test_a_moved_data_file_is_recognised_by_its_bytes(
    tmp_path, tiny_model, sentences, uninterrupted
):
    train_file = tmp_path / "train.tsv"
    train_file.write_bytes(sentences[0].read_bytes())
    stop_at(3, arguments(tiny_model, (train_file, sentences[1]), save_steps=1000), tmp_path / "run")
    moved = train_file.rename(tmp_path / "moved.tsv")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run"), train_file=str(moved)))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_another_base_model_is_refused(tmp_path, tiny_model, sentences):
    """The recorded fingerprint is of the weights, whatever the directory is called."""
    from transformers import AutoTokenizer, BertModel, set_seed

    from tests.conftest import tiny_config

    stop_at(3, arguments(tiny_model, sentences, save_steps=1000), tmp_path / "run")
    other = tmp_path / "other"
    set_seed(99)
    BertModel(tiny_config()).save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    with pytest.raises(MiniloraError, match="base model"):
        fine_tune(
            TrainConfig(resume_from_checkpoint=str(tmp_path / "run"), model_name_or_path=str(other))
        )


def in_config(base: Path, **changes) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def in_vocabulary(base: Path) -> None:
    """Two words change places, so that each has the other's embedding."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda base: in_config(base, hidden_dropout_prob=0.3), "hidden_dropout_prob 0.1 -> 0.3"),
        (lambda base: in_config(base, layer_norm_eps=1e-6), "layer_norm_eps 1e-12 -> 1e-06"),
        (in_vocabulary, "tokenizer of the base model"),
        (lambda base: in_config(base, architectures=["Other"], id2label={"0": "no"}), None),
        (lambda base: in_config(base, transformers_version="0.1"), None),
    ],
)
def test_what_was_changed_beside_the_weights_of_the_base_is_refused(
    change, told, tmp_path, tiny_model, sentences
):
    """Weights and data are the same, and the rest would be another run."""
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    fine_tune(TrainConfig(**arguments(base, sentences, output_dir=str(out), max_steps=1)))
    change(base)
    expected = contextlib.nullcontext()
    if told:
        expected = pytest.raises(MiniloraError, match=f"not what the run began with: .*{told}")
    with expected:
        fine_tune(TrainConfig(resume_from_checkpoint=str(out)))


def test_a_test_file_may_be_given_to_a_resume(tmp_path, tiny_model, sentences):
    out = tmp_path / "run"
    fine_tune(TrainConfig(**arguments(tiny_model, sentences, output_dir=str(out), max_steps=1)))
    given = {"resume_from_checkpoint": str(out), "test_file": str(sentences[1])}
    assert "test_accuracy" in fine_tune(TrainConfig(**given)).metrics


def test_a_run_of_an_older_version_which_recorded_weights_alone_is_resumed(
    tmp_path, tiny_model, sentences
):
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    values = arguments(base, sentences, output_dir=str(out), max_steps=1, save_strategy="no")
    fine_tune(TrainConfig(**values))
    record = json.loads((out / "run.json").read_text())
    del record["base_settings"], record["tokens_sha256"], record["result"]
    (out / "run.json").write_text(json.dumps(record))
    in_config(base, layer_norm_eps=1e-6)
    in_vocabulary(base)
    fine_tune(TrainConfig(resume_from_checkpoint=str(out)))


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_used(
    tmp_path, capsys, tiny_model, sentences, uninterrupted
):
    """One flipped bit in the newest: it gets out of every reader's sight, and the run is still
    exact.
    """
    stop_at(6, arguments(tiny_model, sentences), tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-5"
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert "checkpoint-6 is invalid" in capsys.readouterr().err
    assert [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".invalid-checkpoint-6")]
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_damaged_best_checkpoint_does_not_become_the_final_adapter(
    tmp_path, tiny_model, sentences, capfd
):
    """One flipped bit, which no other check would see: the next best one does."""
    values = arguments(
        tiny_model, sentences, save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "run")))
    losses = [row["eval_loss"] for row in read_rows(tmp_path / "run") if "eval_loss" in row]
    assert losses[0] < losses[1], "the best must not be the checkpoint that a resume reads anyway"
    best = tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors"
    final = tmp_path / "run" / "adapter_model.safetensors"
    assert final.read_bytes() == best.read_bytes()
    final.unlink()
    best.write_bytes(best.read_bytes()[:-1] + bytes([best.read_bytes()[-1] ^ 1]))
    result = fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert "checkpoint-6" in capfd.readouterr().err
    other = tmp_path / "run" / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    assert final.read_bytes() == other.read_bytes() and result.metrics["eval_loss"] == losses[1]


def test_a_run_that_is_stopped_before_it_saves_in_another_directory_goes_on_from_there(
    tmp_path, tiny_model, sentences, uninterrupted, capfd
):
    stop_at(4, arguments(tiny_model, sentences), tmp_path / "run")
    stop_at(0, {"resume_from_checkpoint": str(tmp_path / "run")}, tmp_path / "new")
    shutil.rmtree(tmp_path / "run")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "new")))
    assert f"resuming {tmp_path / 'new' / 'checkpoint-4'}" in capfd.readouterr().err
    assert_same_run(tmp_path / "new", uninterrupted)


def test_the_best_checkpoint_goes_with_a_run_to_another_directory(tmp_path, tiny_model, sentences):
    """The best is the first, which was saved before the run went on elsewhere, twice."""
    values = arguments(
        tiny_model, sentences, save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False, num_train_epochs=3,
    )  # fmt: skip
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    losses = [row["eval_loss"] for row in read_rows(tmp_path / "whole") if "eval_loss" in row]
    assert losses[0] < min(losses[1:])
    stop_at(8, values, tmp_path / "one")
    stop_at(2, {"resume_from_checkpoint": str(tmp_path / "one")}, tmp_path / "two")
    stop_at(100, {"resume_from_checkpoint": str(tmp_path / "two")}, tmp_path / "three")
    assert_same_run(tmp_path / "three", tmp_path / "whole")


def test_the_untrained_model_is_not_looked_for_as_the_best(tmp_path, tiny_model, sentences, capfd):
    """At a rate of zero it is as good as any checkpoint, and before them."""
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_on_start": True}
    values = arguments(tiny_model, sentences, **{**best, "learning_rate": 0.0})
    result = fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "run")))
    assert result.log_history[0]["step"] == 0 and "passed over" not in capfd.readouterr().err


@pytest.mark.parametrize("with_output_dir", [True, False])
def test_a_copy_of_a_checkpoint_is_a_starting_point_beside_which_nothing_is_touched(
    with_output_dir, tmp_path, tiny_model, sentences, uninterrupted
):
    stop_at(6, arguments(tiny_model, sentences), tmp_path / "run")
    best = shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "best")
    before = sorted(tmp_path.rglob("*"))
    if with_output_dir:
        fine_tune(TrainConfig(resume_from_checkpoint=str(best), output_dir=str(tmp_path / "new")))
        assert_same_run(tmp_path / "new", uninterrupted)
        assert (tmp_path / "new" / "run.json").is_file()
        shutil.rmtree(tmp_path / "new")
    else:
        with pytest.raises(MiniloraError, match=r"best is no run's own .* --output_dir"):
            fine_tune(TrainConfig(resume_from_checkpoint=str(best)))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_s_checkpoint_goes_on_in_another_directory_if_asked(
    tmp_path, tiny_model, sentences, uninterrupted
):
    stop_at(4, arguments(tiny_model, sentences), tmp_path / "run")
    place = {"output_dir": str(tmp_path / "new")}
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run"), **place))
    assert_same_run(tmp_path / "new", uninterrupted)
    with pytest.raises(MiniloraError, match="not empty"):
        fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run"), **place))


@pytest.mark.parametrize(
    "setting",
    [
        {"hf_parity": True},
        {"early_stopping_patience": 9},
        {"load_best_model_at_end": True, "save_strategy": "epoch"},
    ],
    ids=str,
)
def test_when_to_evaluate_cannot_change_where_that_bends_the_run(
    setting, tmp_path, tiny_model, sentences
):
    stop_at(3, arguments(tiny_model, sentences, **setting), tmp_path / "run")
    with pytest.raises(MiniloraError, match="cannot change eval_strategy: None -> steps"):
        changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
        fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run"), **changes))


def test_with_every_checkpoint_damaged_the_run_starts_again(
    tmp_path, tiny_model, sentences, uninterrupted
):
    """From run.json, with the damaged ones out of sight."""
    stop_at(2, arguments(tiny_model, sentences), tmp_path / "run")
    for step in (1, 2):
        (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    aside = [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".invalid-")]
    assert len(aside) == 2
    assert_same_run(tmp_path / "run", uninterrupted)


def test_resuming_an_older_checkpoint_sets_the_newer_ones_aside(
    tmp_path, tiny_model, sentences, uninterrupted
):
    stop_at(6, arguments(tiny_model, sentences), tmp_path / "run")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")))
    set_aside = [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".superseded-")]
    assert len(set_aside) == 2
    assert_same_run(tmp_path / "run", uninterrupted)


def test_two_runs_cannot_share_a_directory(tmp_path, tiny_model, sentences):
    """The second is refused while the first lives, and not afterwards."""
    from minilora.files import exclusive

    stop_at(3, arguments(tiny_model, sentences), tmp_path / "run")
    with exclusive(tmp_path / "run"), pytest.raises(MiniloraError, match="in use by another run"):
        fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))


def test_a_save_that_fails_does_not_end_the_run_if_an_older_checkpoint_is_there(
    tmp_path, capsys, tiny_model, sentences, uninterrupted
):
    """The disk refuses files for a while: a warning, no litter, and the numbers are the same."""
    from tests.test_files import largest_file

    values = arguments(tiny_model, sentences, output_dir=str(tmp_path / "run"), save_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with contextlib.ExitStack() as refusing:
        steps = iter(range(1, 1000))

        def tick():
            step = next(steps)
            if step == 4:
                refusing.enter_context(largest_file(10_000))
            if step == 8:
                refusing.close()
            return False

        run_fine_tuning(values, {}, tick)
    warnings = capsys.readouterr().err
    assert "no checkpoint at step 4: File too large; training goes on" in warnings
    assert checkpoint.exists() and not (tmp_path / "run" / "checkpoint-4").exists()
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".tmp-")]
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_run_that_is_stopped_and_cannot_save_says_so(
    tmp_path, tiny_model, sentences, uninterrupted
):
    """ "Nothing is lost" would not be true: the steps since the older checkpoint are."""
    from tests.test_files import largest_file

    values = arguments(tiny_model, sentences, output_dir=str(tmp_path / "run"), save_steps=4)
    steps = iter(range(1, 1000))
    with contextlib.ExitStack() as refusing:

        def stop_at_a_full_disk():
            if next(steps) <= 6:
                return False
            refusing.enter_context(largest_file(10_000))
            return True

        with pytest.raises(OSError, match="File too large; no older checkpoint is lost: make room"):
            run_fine_tuning(values, {}, stop_at_a_full_disk)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_first_or_final_save_that_fails_is_an_error(tmp_path, tiny_model, sentences):
    from tests.test_files import largest_file

    values = arguments(tiny_model, sentences, output_dir=str(tmp_path / "run"), save_steps=2)
    with largest_file(10_000), pytest.raises(OSError, match="File too large"):
        run_fine_tuning(values, {}, lambda: False)


def test_fine_tune_works_in_a_thread_and_leaves_signals_alone(tmp_path, tiny_model, sentences):
    before = signal.getsignal(signal.SIGINT)
    config = TrainConfig(
        **arguments(tiny_model, sentences, max_steps=2), output_dir=str(tmp_path / "run")
    )
    thread = threading.Thread(target=fine_tune, args=(config, LoraConfig(r=4)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_checkpoint_files_have_the_permissions_the_umask_gives(uninterrupted):
    umask = os.umask(0)
    os.umask(umask)
    for path in uninterrupted.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def own_loop(scale=None, learning_rate=1e-3) -> Training:
    """What a user's own loop has, without a config or a timetable."""
    from tests.conftest import tiny_classifier

    model = tiny_classifier()
    add_adapter(model, LoraConfig(task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    training = Training(model, optimizer, scheduler)
    if scale is not None:
        training.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        training.scaler.scale(torch.ones(()))  # it knows its scale from its first use on
    return training


def steps_of_own_loop(training: Training, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        input_ids = torch.randint(5, 30, (4, 8))
        training.model.train()
        loss = training.model(input_ids=input_ids, labels=torch.tensor([0, 1, 0, 1])).loss
        loss.backward()
        training.optimizer.step()
        training.scheduler.step()
        training.optimizer.zero_grad()
        training.state.global_step += 1
        losses.append(loss.item())
    return losses


def test_a_loop_of_ones_own_resumes_exactly(tmp_path):
    """Nothing but the public functions, and no JSON by hand; a step saved twice is replaced."""
    torch.manual_seed(3)
    training = own_loop()
    steps_of_own_loop(training, 2)
    save_checkpoint(tmp_path, training)
    steps_of_own_loop(training, 1)
    save_checkpoint(tmp_path, training)
    assert save_checkpoint(tmp_path, training) == latest_checkpoint(tmp_path)
    expected = steps_of_own_loop(training, 3)
    again = own_loop()
    state = load_checkpoint(tmp_path / "checkpoint-3", again)
    assert state.global_step == again.state.global_step == 3
    assert steps_of_own_loop(again, 3) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(MiniloraError, match="a loop of your own"):
        fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path)))


def test_the_checkpoint_of_a_very_long_run_is_read(tmp_path):
    """Its log alone is larger than any other JSON file that is read."""
    training = own_loop()
    rows = [{"step": step, "epoch": 0.5, "loss": 0.1} for step in range(60_000)]
    training.state.log_history = rows
    path = save_checkpoint(tmp_path, training)
    assert (path / "trainer_state.json").stat().st_size > 4_000_000
    assert load_checkpoint(path, own_loop()).log_history == rows


def test_the_loss_scale_is_part_of_a_checkpoint(tmp_path):
    """Of a float16 run, which needs a GPU; the scaler itself works on a CPU, too."""
    path = save_checkpoint(tmp_path, own_loop(scale=1024.0))
    assert (path / "scaler.pt").is_file()
    restored = own_loop(scale=2.0)
    load_checkpoint(path, restored)
    assert restored.scaler.get_scale() == 1024.0
    other = save_checkpoint(tmp_path / "other", own_loop())
    with pytest.raises(MiniloraError, match=r"has no scaler\.pt"):
        load_checkpoint(other, restored)
