"""What the first version of minilora wrote still loads and resumes.

`first_version/` holds a base model, two interrupted runs, a finished one and an adapter, all
written by it, and what it said came next in each (`expected.json`).
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from minilora import TrainConfig, evaluate_file, fine_tune, load_adapter, open_run
from minilora.bert.dataset import epoch_order
from minilora.fine_tuning import run_fine_tuning
from minilora.training.checkpoint import read_checkpoint
from tests.conftest import read_rows, tiny_config

FIRST = Path(__file__).parent / "first_version"
EXPECTED = json.loads((FIRST / "expected.json").read_text())
RUNS = {"midway": 3, "pending": 6}


def inputs() -> dict[str, str]:
    """Where the run's inputs are now: their recorded places are gone."""
    names = {"model_name_or_path": "base", "train_file": "train.tsv"}
    names["validation_file"] = "validation.tsv"
    return {flag: str(FIRST / name) for flag, name in names.items()}


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(FIRST, tmp_path / "first"))


@pytest.fixture
def restored(monkeypatch):
    """Every `Training` that a resume restores, seen at the moment when its first step is due."""
    from minilora.training import run_directory as run_room

    seen = []
    fit = run_room.fit

    def watched(training, config, callbacks):
        seen.append(training)
        fit(training, config, callbacks)

    monkeypatch.setattr(run_room, "fit", watched)
    return seen


@pytest.mark.parametrize("name", RUNS)
def test_position_tensors_moments_and_generators_are_as_they_were(name, copied, restored):
    checkpoint = copied / name / f"checkpoint-{RUNS[name]}"
    files = {n: (checkpoint / n).read_bytes() for n in ("optimizer.pt", "rng_state.pth")}
    flags = {"resume_from_checkpoint": str(copied / name), **inputs(), "eval_strategy": "no"}
    run_fine_tuning(flags, {}, should_stop=lambda: True)
    (training,) = restored
    state, expected = training.state, EXPECTED[name]
    for part in ("global_step", "loss_sum", "loss_total", "logged_step", "best_metric"):
        assert getattr(state, part) == expected["state"][part]
    # The first version's "pending": the epoch's steps are taken and its evaluation is not.
    assert (state.epoch, state.step_in_epoch) == ((1, 0) if name == "pending" else (0, 3))

    tensors = load_file(checkpoint / "adapter_model.safetensors")
    from minilora import adapter_state_dict

    found = adapter_state_dict(training.model)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert files == {n: (checkpoint / n).read_bytes() for n in files}
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    for index, values in training.optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[key], moments[index][key]) for key in values)

    order = epoch_order(24, 42, state.epoch)
    next_examples = order[4 * state.step_in_epoch :][:8]
    assert next_examples.tolist() == expected["next_examples"]
    from minilora.training.rng import mask_stream

    stream = mask_stream(training.model)
    assert stream.keep(torch.Size([64]), 0.1).tolist() == expected["next_masks"]
    assert torch.randint(0, 2**31, (4,)).tolist() == expected["next_torch"]
    assert random.random() == expected["next_python"]
    assert np.random.random() == expected["next_numpy"]


def test_a_pending_evaluation_runs_first(copied):
    result = fine_tune(
        TrainConfig(resume_from_checkpoint=str(copied / "pending"), **inputs(), device="cpu")
    )
    rows = read_rows(copied / "pending")
    evaluations = [row["step"] for row in rows if "eval_loss" in row]
    assert result.global_step == 12 and evaluations == [6, 12]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12]
    # The same numbers as the first version's undisturbed run, up to rounding.
    undisturbed = read_rows(FIRST / "finished")
    for ours, theirs in zip(rows, undisturbed, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_run_stopped_midway_ends_like_the_undisturbed_one(copied):
    fine_tune(TrainConfig(resume_from_checkpoint=str(copied / "midway"), **inputs(), device="cpu"))
    for ours, theirs in zip(
        read_rows(copied / "midway"), read_rows(FIRST / "finished"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_finished_run_evaluates_as_it_did():
    run = open_run(FIRST / "finished", model_name_or_path=inputs()["model_name_or_path"])
    found = evaluate_file(run, inputs()["validation_file"]).metrics
    for name, value in EXPECTED["finished"].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_an_adapter_gives_the_same_logits():
    """DoRA over the query layers and the word embeddings, and a pooler trained in full."""
    from transformers import set_seed

    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    set_seed(0)
    model = BertForSequenceClassification(tiny_config(**small, num_labels=3))
    load_adapter(model, FIRST / "adapter")
    logits = model.eval()(input_ids=torch.arange(5, 13)[None]).logits
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["adapter"]["logits"]))


def test_a_checkpoint_says_what_its_run_was():
    record = read_checkpoint(FIRST / "midway" / "checkpoint-3").manifest.record
    assert record.labels == ["negative", "positive"] and record.arguments.max_steps == 12
