"""HF Trainer + PEFT as the oracle of the loop: with hf_parity, the same bits at every step.

Both run from the same files, in Trainer's reference order: set_seed, from_pretrained,
get_peft_model, Trainer, train. Compared are every logged loss, gradient norm and learning rate,
every evaluation's loss, and the final tensors.
"""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from minilora import MiniloraError
from minilora.fine_tuning import run_fine_tuning
from minilora.training import metrics_file

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
        per_device_eval_batch_size=settings.pop("per_device_eval_batch_size", 32),
        report_to=[],
        disable_tqdm=True,
        **{"use_cpu": True, "save_strategy": "no", **settings},
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
    "evaluation every 5 steps, and at the end": {"eval_strategy": "steps", "eval_steps": 5},
    "evaluation each epoch": {"eval_strategy": "epoch"},
    "max_steps inside an epoch": {"max_steps": 8},
    "means of three steps": {"logging_steps": 3},
    "batch of 5": {"per_device_train_batch_size": 5},
    "smoothed labels, in evaluation too": {"label_smoothing_factor": 0.2, "eval_strategy": "epoch"},
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


def test_every_number_is_trainers_where_the_tokenizer_pads_on_the_left(
    tmp_path, tiny_model, sentences
):
    """There every token's position is another: the run is not that of padding on the right."""
    left = shutil.copytree(tiny_model, tmp_path / "left")
    AutoTokenizer.from_pretrained(tiny_model, padding_side="left").save_pretrained(left)
    settings, logs = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}, []
    for base in (left, tiny_model):
        result = ours(base, sentences, tmp_path / f"of {base.name}", settings)
        logs.append(compared(result.log_history))
    theirs = trainer(left, sentences, tmp_path / "theirs", dict(settings))
    theirs.train()
    assert logs[0] == compared(theirs.state.log_history) and logs[0] != logs[1]


def test_without_parity_the_run_is_another(tmp_path, tiny_model, sentences):
    """Negative control: the comparison notices one draw more or less per epoch."""
    theirs = trainer(tiny_model, sentences, tmp_path / "theirs", {})
    theirs.train()
    result = ours(tiny_model, sentences, tmp_path / "ours", {"hf_parity": False})
    assert compared(result.log_history) != compared(theirs.state.log_history)


# Interchange. 12 steps: 2 epochs of 6. Trainer resumes from each of our checkpoints, and we from
# each of Trainer's.
STEPS = 12
EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, sentences):
    """One uninterrupted run of Trainer's with a checkpoint at each step: (directory, rows,
    tensors).
    """
    output_dir = tmp_path_factory.mktemp("trainer") / "whole"
    run = trainer(tiny_model, sentences, output_dir, dict(EACH_STEP))
    run.train()
    return output_dir, compared(run.state.log_history), clone(peft_tensors(run.model))


@pytest.fixture(scope="module")
def our_whole(tmp_path_factory, tiny_model, sentences):
    output_dir = tmp_path_factory.mktemp("minilora") / "whole"
    ours(tiny_model, sentences, output_dir, dict(EACH_STEP))
    return output_dir


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def resumed_by_trainer(
    tiny_model, sentences, output_dir, checkpoint, settings=None, stop_after=None
):
    run = trainer(tiny_model, sentences, output_dir, settings or {}, stop_after=stop_after)
    run.train(resume_from_checkpoint=str(checkpoint))
    return run


def flags_to_resume(tiny_model, sentences, checkpoint, settings=None) -> dict:
    """Trainer's files do not tell the data, the schedule, nor how its losses are summed."""
    arguments = our_arguments(tiny_model, sentences, settings or {})
    arguments.pop("num_train_epochs")
    return {**arguments, "resume_from_checkpoint": str(checkpoint)}


@pytest.mark.parametrize("step", range(1, STEPS))
def test_trainer_continues_our_checkpoint_bitwise(
    step, tmp_path, tiny_model, sentences, whole, our_whole
):
    _, expected, tensors = whole
    checkpoint = our_whole / f"checkpoint-{step}"
    run = resumed_by_trainer(tiny_model, sentences, tmp_path / "out", checkpoint)
    assert compared(run.state.log_history) == expected
    assert_same_tensors(tensors, peft_tensors(run.model))


@pytest.mark.parametrize("step", range(1, STEPS))
def test_we_continue_trainers_checkpoint_bitwise(step, tmp_path, tiny_model, sentences, whole):
    directory, expected, tensors = whole
    checkpoint = tmp_path / "out" / f"checkpoint-{step}"
    shutil.copytree(directory / f"checkpoint-{step}", checkpoint)
    result = run_fine_tuning(flags_to_resume(tiny_model, sentences, checkpoint), {}, lambda: False)
    assert compared(result.log_history) == expected
    assert_same_tensors(tensors, load_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4},
        pytest.param({"eval_strategy": "steps", "eval_steps": 2}, marks=pytest.mark.slow),
        {"eval_strategy": "epoch"},
        pytest.param({"lr_scheduler_type": "constant"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_interchange_is_bitwise_with_other_settings(settings, tmp_path, tiny_model, sentences):
    settings = {**settings, "num_train_epochs": 3}
    run = trainer(tiny_model, sentences, tmp_path / "whole", {**EACH_STEP, **settings})
    run.train()
    expected, tensors = compared(run.state.log_history), clone(peft_tensors(run.model))
    for step in range(1, run.state.max_steps):
        checkpoint = tmp_path / f"out-{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", checkpoint)
        flags = flags_to_resume(tiny_model, sentences, checkpoint, settings)
        result = run_fine_tuning(flags, {}, lambda: False)
        assert compared(result.log_history) == expected, step
        assert_same_tensors(tensors, load_file(checkpoint.parent / "adapter_model.safetensors"))


# All that a run may be told at once.
DRAWN = {
    "per_device_train_batch_size": (4, 5, 8, 64), "per_device_eval_batch_size": (3, 32),
    "gradient_accumulation_steps": (1, 1, 2, 3), "num_train_epochs": (0.5, 1, 1.3, 2),
    "max_steps": (-1, -1, -1, 3, 7), "warmup_steps": (0, 2, 2.7, 0.3),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
    "weight_decay": (0.0, 0.1), "adam_beta1": (0.9, 0.0), "adam_beta2": (0.999, 0.9),
    "adam_epsilon": (1e-8, 1.0), "max_grad_norm": (1.0, 0.0, 0.01), "seed": (42, 2**32 - 1),
    "data_seed": (None, 0, 2**40), "eval_strategy": ("no", "steps", "epoch"), "eval_steps": (2, 3),
}  # fmt: skip
DRAWN_LORA = {
    "r": (1, 4), "lora_alpha": (1, 16), "lora_dropout": (0.0, 0.5), "use_rslora": (False, True),
    "target_modules": (["query", "value"], "all-linear", r".*(query|value|output\.dense)"),
    "init_lora_weights": (True, "gaussian", "pissa", "olora"), "rank_pattern": ({}, {"query": 3}),
    "use_dora": (False, True), "alpha_pattern": ({}, {"value": 32}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", range(14))
def test_drawn_settings_are_trainers_whole_and_resumed_by_either(
    number, tmp_path, tiny_model, sentences
):
    draw = random.Random(number)
    settings, lora = ({n: draw.choice(of[n]) for n in of} for of in (DRAWN, DRAWN_LORA))
    settings |= EACH_STEP
    places = [tmp_path / name for name in ("theirs", "ours", "there", "here")]
    whole = trainer(tiny_model, sentences, places[0], settings, {**lora})
    whole.train()
    expected, tensors = compared(whole.state.log_history), clone(peft_tensors(whole.model))
    result = ours(tiny_model, sentences, places[1], settings, lora)
    assert compared(result.log_history) == expected
    assert_same_tensors(tensors, load_file(places[1] / "adapter_model.safetensors"))
    if whole.state.max_steps == 1:
        return
    name = f"checkpoint-{draw.randrange(1, whole.state.max_steps)}"
    resumed = trainer(tiny_model, sentences, places[2], settings, {**lora})
    resumed.train(resume_from_checkpoint=str(places[1] / name))
    assert compared(resumed.state.log_history) == expected
    assert_same_tensors(tensors, peft_tensors(resumed.model))
    flags = our_arguments(tiny_model, sentences, settings)
    flags |= {"resume_from_checkpoint": str(places[0] / name), "output_dir": str(places[3])}
    assert compared(run_fine_tuning(flags, {}, lambda: False).log_history) == expected
    assert_same_tensors(tensors, load_file(places[3] / "adapter_model.safetensors"))


def test_early_stopping_counts_on_in_either_ones_checkpoint(tmp_path, tiny_model, sentences):
    """At a rate of zero no evaluation is better than the first."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    settings |= {**EACH_STEP, "greater_is_better": False, "learning_rate": 0.0}
    own = {**settings, "early_stopping_patience": 4}
    theirs = {**settings, "restore_callback_states_from_checkpoint": True}
    runs = [trainer(tiny_model, sentences, tmp_path / name, theirs) for name in ("whole", "out")]
    for run in runs:
        run.add_callback(EarlyStoppingCallback(4))
    runs[0].train()
    expected = compared(runs[0].state.log_history)
    assert expected[-1]["step"] == 5
    whole = ours(tiny_model, sentences, tmp_path / "ours", own)
    assert compared(whole.log_history) == expected
    runs[1].train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    assert compared(runs[1].state.log_history) == expected
    flags = flags_to_resume(tiny_model, sentences, tmp_path / "whole" / "checkpoint-3", own)
    result = run_fine_tuning({**flags, "output_dir": str(tmp_path / "on")}, {}, lambda: False)
    assert compared(result.log_history) == expected


@pytest.mark.parametrize("kept", [100, 2])
def test_a_relay_of_single_steps_with_rotation_is_one_uninterrupted_run(
    kept, tmp_path, monkeypatch, tiny_model, sentences, whole
):
    """Trainer and minilora take turns in one directory; each sees only what the other left. The
    whole log is in ours.
    """
    monkeypatch.setattr(metrics_file, "KEPT_ROWS", kept)
    _, expected, tensors = whole
    output_dir = tmp_path / "relay"
    settings = {**EACH_STEP, "save_total_limit": 2}
    ours(tiny_model, sentences, output_dir, dict(settings), stop_after=1)
    for step in range(2, STEPS + 1):
        last = get_last_checkpoint(str(output_dir))
        if step % 2 == 0:
            run = resumed_by_trainer(
                tiny_model, sentences, output_dir, last, dict(settings), stop_after=step
            )
        else:
            calls = iter([False, True])
            result = run_fine_tuning(
                {"resume_from_checkpoint": str(output_dir)}, {}, lambda calls=calls: next(calls)
            )
            rows = compared(result.log_history)
            assert rows and rows == expected[: len(rows)]
    assert (compared(run.state.log_history) == expected) == (kept == 100)
    assert_same_tensors(tensors, peft_tensors(run.model))


def test_a_checkpoint_of_the_default_mode_is_resumed_by_trainer(tmp_path, tiny_model, sentences):
    ours(tiny_model, sentences, tmp_path / "ours", {**EACH_STEP, "hf_parity": False}, stop_after=4)
    run = resumed_by_trainer(
        tiny_model, sentences, tmp_path / "out", tmp_path / "ours" / "checkpoint-4"
    )
    assert run.state.global_step == STEPS


def test_a_checkpoint_of_trainers_is_continued_in_the_default_mode(
    tmp_path, tiny_model, sentences, whole
):
    checkpoint = tmp_path / "out" / "checkpoint-4"
    shutil.copytree(whole[0] / "checkpoint-4", checkpoint)
    flags = flags_to_resume(tiny_model, sentences, checkpoint, {"hf_parity": False})
    assert run_fine_tuning(flags, {}, lambda: False).global_step == STEPS


def test_a_copy_of_trainers_checkpoint_is_a_starting_point_under_any_name(
    tmp_path, tiny_model, sentences, whole
):
    """Beside which nothing is touched; what `save_model` alone has left is none."""
    directory, expected, _ = whole
    best = shutil.copytree(directory / "checkpoint-5", tmp_path / "copies" / "best")
    flags = flags_to_resume(tiny_model, sentences, best)
    with pytest.raises(MiniloraError, match="best is no run's own .* --output_dir"):
        run_fine_tuning(flags, {}, lambda: False)
    new = {"output_dir": str(tmp_path / "new")}
    assert compared(run_fine_tuning(flags | new, {}, lambda: False).log_history) == expected
    assert [path.name for path in best.parent.iterdir()] == ["best"]
    (best / "trainer_state.json").unlink()
    with pytest.raises(MiniloraError, match="holds neither a complete"):
        run_fine_tuning(flags | {"output_dir": str(tmp_path / "other")}, {}, lambda: False)


def test_the_base_is_the_one_that_trainers_adapter_names_and_another_is_said(
    tmp_path, tiny_model, sentences, whole, capsys
):
    directory, expected, _ = whole
    for name, model in (("named", {}), ("moved", {"model_name_or_path": str(tmp_path / "base")})):
        checkpoint = tmp_path / name / "checkpoint-5"
        shutil.copytree(directory / "checkpoint-5", checkpoint)
        flags = flags_to_resume(tiny_model, sentences, checkpoint)
        del flags["model_name_or_path"]
        shutil.copytree(tiny_model, tmp_path / "base", dirs_exist_ok=True)
        result = run_fine_tuning(flags | model, {}, lambda: False)
        assert compared(result.log_history) == expected
        told = f"adapter_config.json names the base {tiny_model}, not {tmp_path / 'base'}"
        assert (told in capsys.readouterr().err) == (name == "moved")


@pytest.fixture
def trainers(tmp_path, whole):
    """A copy of Trainer's checkpoint 5, to be damaged."""
    return Path(shutil.copytree(whole[0] / "checkpoint-5", tmp_path / "out" / "checkpoint-5"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["absent", "empty", "truncated"])
def test_a_part_that_trainer_would_do_without_is_required(
    name, damage, trainers, tiny_model, sentences
):
    """Trainer resumes silently without it, and wrongly."""
    path = trainers / name
    data = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2])
    flags = flags_to_resume(tiny_model, sentences, trainers)
    with pytest.raises(MiniloraError, match=name):
        run_fine_tuning(flags, {}, lambda: False)
    if damage == "absent":
        result = run_fine_tuning(
            {**flags, "allow_inexact_resume": True, "save_strategy": "epoch"}, {}, lambda: False
        )
        manifest = json.loads(
            (trainers.parent / f"checkpoint-{STEPS}" / "minilora.json").read_text()
        )
        assert result.global_step == STEPS and manifest["state"]["inexact_from"] == 5


def test_a_missing_tensor_is_refused_where_trainer_keeps_its_fresh_draw(
    trainers, tiny_model, sentences
):
    path = trainers / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    del tensors[first]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MiniloraError, match=f"lacks tensor {first}"):
        run_fine_tuning(flags_to_resume(tiny_model, sentences, trainers), {}, lambda: False)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"global_step": "five"}'])
def test_a_damaged_state_is_refused(text, trainers, tiny_model, sentences):
    (trainers / "trainer_state.json").write_text(text)
    with pytest.raises(MiniloraError, match=r"trainer_state\.json"):
        run_fine_tuning(flags_to_resume(tiny_model, sentences, trainers), {}, lambda: False)


def test_training_args_bin_is_never_opened(trainers, tiny_model, sentences, tmp_path):
    """It is a pickle of an object; this one would leave a trace."""

    class Trace:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (trainers / "training_args.bin").write_bytes(pickle.dumps(Trace()))
    (trainers / "training_args.bin").chmod(0)
    run_fine_tuning(flags_to_resume(tiny_model, sentences, trainers), {}, lambda: False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-4}, "learning_rate: 0.0001 -> 0.003"),
        ({"seed": 1}, "seed: 1 -> 42"),
        ({"weight_decay": 0.1}, "weight_decay: 0.1 -> 0.0"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 4 -> 8"),
        ({"max_steps": 100}, "max_steps: 100 -> 12"),
        ({"lr_scheduler_type": "cosine"}, "the learning rate after step 5"),
        ({"gradient_accumulation_steps": 2}, "step 5 is epoch 0.8333 there"),
    ],
)
def test_arguments_that_are_not_trainers_are_refused(
    change, message, trainers, tiny_model, sentences
):
    flags = {**flags_to_resume(tiny_model, sentences, trainers), **change}
    with pytest.raises(MiniloraError, match=message):
        run_fine_tuning(flags, {}, lambda: False)


def test_lora_arguments_that_are_not_trainers_are_refused(trainers, tiny_model, sentences):
    with pytest.raises(MiniloraError, match="r: 4 -> 16"):
        run_fine_tuning(flags_to_resume(tiny_model, sentences, trainers), {"r": 16}, lambda: False)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_one_part_of_another_step_makes_another_run(
    name, tmp_path, trainers, tiny_model, sentences, whole
):
    """Negative control: the comparison notices a stale optimizer, generator or adapter."""
    shutil.copy(whole[0] / "checkpoint-3" / name, trainers / name)
    result = run_fine_tuning(flags_to_resume(tiny_model, sentences, trainers), {}, lambda: False)
    assert compared(result.log_history) != whole[1]
