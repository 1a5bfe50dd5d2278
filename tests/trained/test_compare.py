"""inspect --diff: which tensors, arguments and log entries differ, and by how much."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from minilora import LoraConfig, TrainConfig, compare_directories, fine_tune, write_merged_model

QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


def test_a_directory_does_not_differ_from_itself(finished_run):
    for part in ("", "checkpoint-6"):
        found = compare_directories(finished_run / part, finished_run / part)
        assert (found["tensors"], found["arguments"], found["log"]) == ([], [], [])
        assert found["equal_tensors"] > 26


def test_a_changed_tensor_is_named_with_the_size_of_the_change(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(file)
    before = tensors[QUERY].clone()
    tensors[QUERY][0, 0] += 0.5
    save_file(tensors, file)
    (difference,) = compare_directories(finished_run, tmp_path / "other")["tensors"]
    assert difference["name"] == QUERY and difference["max_abs"] == pytest.approx(0.5)
    assert difference["relative"] == pytest.approx(0.5 / before.norm().item(), rel=1e-5)


def test_two_checkpoints_differ_in_adapter_optimizer_schedule_and_generators(finished_run):
    found = compare_directories(finished_run / "checkpoint-3", finished_run / "checkpoint-6")
    names = {difference["name"] for difference in found["tensors"]}
    assert {QUERY, "optimizer.pt.state.0.exp_avg", "scheduler.pt.last_epoch"} <= names
    assert "rng_state.pth.mask_stream" in names
    assert found["arguments"] == []
    assert {entry["step"] for entry in found["log"]} == {4, 5, 6}


def test_two_runs_differ_in_what_was_asked_and_came_of_it(
    finished_run, tiny_model, sentences, tmp_path, command
):
    config = TrainConfig(
        model_name_or_path=str(tiny_model), train_file=str(sentences[0]), max_steps=6,
        validation_file=str(sentences[1]), output_dir=str(tmp_path / "out"), logging_steps=1,
        learning_rate=1e-2, device="cpu",
    )  # fmt: skip
    fine_tune(config, LoraConfig(r=2, lora_alpha=16, target_modules="all-linear"))
    found = compare_directories(finished_run, tmp_path / "out")
    arguments = {entry["name"]: (entry["a"], entry["b"]) for entry in found["arguments"]}
    assert arguments["arguments.learning_rate"] == (0.02, 0.01)
    assert arguments["lora.r"] == (4, 2) and "arguments.seed" not in arguments
    assert {"step": 1, "name": "learning_rate", "a": 0.02, "b": 0.01} in found["log"]
    assert not [entry for entry in found["log"] if entry["name"].endswith("runtime")]
    shapes = [tensor["what"] for tensor in found["tensors"] if tensor["name"] == QUERY]
    assert shapes == ["torch.float32 (4, 32) in a, torch.float32 (2, 32) in b"]

    result = command("inspect", "--diff", finished_run, tmp_path / "out")
    assert result.code == 0 and "{name: arguments.learning_rate, a: 0.02, b: 0.01}" in result.out
    assert result.summary()["arguments"] == len(arguments)
    whole = command("inspect", "--diff", finished_run, tmp_path / "out", "--json")
    assert json.loads(whole.out) == found


def test_merged_models_are_compared_tensor_by_tensor(finished_run, tiny_model, tmp_path):
    merged = write_merged_model([finished_run], tmp_path / "merged")
    found = compare_directories(tiny_model, merged)
    only = [difference for difference in found["tensors"] if "what" in difference]
    assert len(only) == len(load_file(tiny_model / "model.safetensors")) + 41  # "bert." before each
    again = write_merged_model([finished_run], tmp_path / "again", max_shard_size="20KB")
    assert compare_directories(merged, again)["tensors"] == []
