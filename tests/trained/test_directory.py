"""inspect: what a directory is, whether it verifies, what a resume would do."""

import json
import pickle
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from minilora import (
    LoraConfig,
    MiniloraError,
    TrainConfig,
    Training,
    add_adapter,
    fine_tune,
    inspect_directory,
    open_run,
    save_checkpoint,
    trainable_parameters,
    write_merged_model,
)
from minilora.files import exclusive
from minilora.fine_tuning import run_fine_tuning
from minilora.lora.peft_files import adapter_state_dict, load_adapter


@pytest.fixture
def run_copy(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "out")
    return tmp_path / "out"


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_run_is_described(finished_run, tiny_model):
    found = inspect_directory(finished_run)
    assert (found["kind"], found["verified"], found["problems"]) == ("run", True, [])
    assert found["position"] == {
        "finished": True,
        "checkpoints": ["checkpoint-6", "checkpoint-3"],
        "extended": [],
        "resumed": [],
    }
    assert found["labels"] == ["negative", "positive"] and found["arguments"]["max_steps"] == 6
    assert found["config"]["r"] == 4 and found["log"]["last"]["step"] == 6
    assert found["resume"]["refuses"] == []
    assert found["resume"]["remarks"] == ["finished: nothing is left to train"]


def test_its_tensors_are_the_adapters_with_their_norms(finished_run, tiny_model):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    load_adapter(model, finished_run)
    found = {tensor["name"]: tensor for tensor in inspect_directory(finished_run)["tensors"]}
    expected = adapter_state_dict(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name]["shape"] == list(tensor.shape) and found[name]["dtype"] == "float32"
        assert found[name]["norm"] == pytest.approx(tensor.norm().item(), rel=1e-5)


def test_the_trained_parameters_are_those_of_the_adapter_and_its_head(finished_run, tiny_model):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    load_adapter(model, finished_run)
    adapter = sum(t.numel() for t in adapter_state_dict(model).values())
    found = inspect_directory(finished_run)["trainable"]
    base = load_file(tiny_model / "model.safetensors").values()
    total = adapter + sum(tensor.numel() for tensor in base if tensor.is_floating_point())
    share = round(100 * adapter / total, 4)
    assert found == {"parameters": adapter, "of": total, "percent": share}


def test_the_trainable_share_reads_no_weights_and_is_unknown_without_the_base(run_copy):
    config = run_copy / "adapter_config.json"
    values = json.loads(config.read_text())
    sparse = run_copy / "large"
    sparse.mkdir()
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2**32], "data_offsets": [0, 2**34]},
    }
    text = json.dumps(header).encode()
    with (sparse / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**34)
    for base, of in ((str(sparse), 2**32), (str(run_copy / "gone"), None), (None, None)):
        config.write_text(json.dumps({**values, "base_model_name_or_path": base}))
        found = inspect_directory(run_copy)["trainable"]
        assert found["of"] == (of and of + found["parameters"])


def test_a_checkpoint_of_ours_is_described_and_would_be_resumed(run_copy):
    shutil.rmtree(run_copy / "checkpoint-6")
    found = inspect_directory(run_copy / "checkpoint-3")
    assert (found["kind"], found["verified"]) == ("checkpoint", True)
    assert found["position"]["step"] == 3 and found["position"]["max_steps"] == 6
    assert found["resume"]["checkpoint"] == str(run_copy / "checkpoint-3")
    assert (found["resume"]["step"], found["resume"]["refuses"]) == (3, [])


def test_what_it_says_of_a_resume_is_what_a_resume_does(run_copy, capsys):
    """The older checkpoint: 6 would be set aside, and is."""
    before = contents(run_copy)
    found = inspect_directory(run_copy / "checkpoint-3")
    assert found["resume"]["remarks"] == ["checkpoint-6 would be set aside as .superseded-..."]
    assert contents(run_copy) == before
    run_fine_tuning({"resume_from_checkpoint": str(run_copy / "checkpoint-3")}, {}, lambda: False)
    err = capsys.readouterr().err
    assert "checkpoint-6 is superseded" in err and "resuming" in err and "at step 3" in err


def test_a_damaged_checkpoint_does_not_verify_and_an_older_one_would_be_resumed(run_copy):
    flip_a_bit(run_copy / "checkpoint-6" / "optimizer.pt")
    found = inspect_directory(run_copy)
    assert found["verified"] is None
    assert "optimizer.pt is not what was written" in found["problems"][0]
    assert found["resume"]["checkpoint"] == str(run_copy / "checkpoint-3")
    assert found["resume"]["remarks"] == ["checkpoint-6 would be set aside as .invalid-..."]
    found = inspect_directory(run_copy / "checkpoint-6")
    assert "optimizer.pt is not what was written" in found["resume"]["refuses"][0]


def test_why_a_resume_would_be_refused(run_copy, tmp_path):
    """And it is: the same reasons, one by one."""
    recorded = json.loads((run_copy / "run.json").read_text())
    for step in (3, 6):
        shutil.rmtree(run_copy / f"checkpoint-{step}")
    del recorded["result"]
    changed = tmp_path / "train.tsv"
    changed.write_text("text\tlabel\ngood\tpositive\nbad\tnegative\n")
    recorded["arguments"] |= {"train_file": str(changed), "validation_file": "/gone.tsv"}
    (run_copy / "run.json").write_text(json.dumps(recorded))
    refuses = inspect_directory(run_copy)["resume"]["refuses"]
    gone = "the validation file /gone.tsv is gone (give --validation_file if it has moved)"
    assert refuses == [gone, f"the train file ({changed}) has changed"]
    with pytest.raises(MiniloraError, match="/gone.tsv cannot be read"):
        run_fine_tuning({"resume_from_checkpoint": str(run_copy)}, {}, lambda: False)
    recorded["arguments"] |= {"model_name_or_path": "/gone/away"}
    (run_copy / "run.json").write_text(json.dumps(recorded))
    *_, refused = inspect_directory(run_copy)["resume"]["refuses"]
    assert "'/gone/away': there is no such directory" in refused


def test_a_run_in_use_says_so(run_copy):
    with exclusive(run_copy):
        assert "is in use by another run" in inspect_directory(run_copy)["resume"]["refuses"][0]
    assert inspect_directory(run_copy)["resume"]["refuses"] == []


def test_a_run_without_a_checkpoint_would_start_at_step_0(tiny_model, sentences, tmp_path):
    config = TrainConfig(
        model_name_or_path=str(tiny_model), train_file=str(sentences[0]), max_steps=1,
        output_dir=str(tmp_path / "out"), save_strategy="no", device="cpu",
    )  # fmt: skip
    fine_tune(config)
    resume = inspect_directory(tmp_path / "out")["resume"]
    assert "finished and kept no checkpoint" in resume["refuses"][0]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    del run["result"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    resume = inspect_directory(tmp_path / "out")["resume"]
    assert resume["refuses"] == [] and (resume["checkpoint"], resume["step"]) == (None, 0)


def test_trainers_checkpoint_is_told_from_ours_and_its_pickle_stays_closed(trainers, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    shutil.copytree(trainers, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    found = inspect_directory(tmp_path / "checkpoint-2")
    assert found["kind"] == "checkpoint of HF Trainer" and found["problems"] == []
    assert found["position"] == {"step": 2, "max_steps": 2, "epoch": 2.0}
    assert found["arguments"]["seed"] == 7 and len(found["tensors"]) == 10
    assert found["resume"]["checkpoint"] == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    found = inspect_directory(tmp_path / "checkpoint-2")
    assert "lacks scheduler.pt" in found["problems"][0]
    assert "lacks scheduler.pt" in found["resume"]["refuses"][0]


def test_a_pickle_that_would_run_code_is_a_problem_and_does_not_run(trainers, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    shutil.copytree(trainers, tmp_path / "checkpoint-2")
    torch.save(Bomb(), tmp_path / "checkpoint-2" / "optimizer.pt")
    found = inspect_directory(tmp_path / "checkpoint-2")
    assert any("optimizer.pt cannot be read safely" in problem for problem in found["problems"])
    assert "optimizer.pt cannot be read safely" in found["resume"]["refuses"][0]


def test_an_incomplete_checkpoint_is_called_that(run_copy):
    (run_copy / "checkpoint-6" / "minilora.json").unlink()
    found = inspect_directory(run_copy / "checkpoint-6")
    assert found["kind"] == "incomplete checkpoint" and "is incomplete" in found["problems"][0]
    assert found["resume"]["refuses"]


def test_arguments_of_trainers_that_a_crash_left_empty_make_no_checkpoint(trainers, tmp_path):
    shutil.copytree(trainers, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "training_args.bin").write_bytes(b"")
    found = inspect_directory(tmp_path / "checkpoint-2")
    assert found["kind"] == "incomplete checkpoint" and found["problems"]
    assert found["resume"]["refuses"]
    with pytest.raises(MiniloraError, match="an incomplete checkpoint"):
        open_run(tmp_path / "checkpoint-2")


def test_a_checkpoint_of_a_loop_of_ones_own_is_described_and_opened_as_an_adapter(
    tiny_model, tmp_path
):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    add_adapter(model, LoraConfig(task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW(trainable_parameters(model))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    found = inspect_directory(save_checkpoint(tmp_path, Training(model, optimizer, scheduler)))
    assert (found["kind"], found["verified"], found["problems"]) == ("checkpoint", True, [])
    assert found["arguments"] is None and found["resume"]["refuses"]
    assert open_run(found["path"], str(tiny_model)).task.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_an_adapter_of_pefts_and_models_are_told_apart(finished_run, tiny_model, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2))
    theirs.save_pretrained(tmp_path / "theirs")
    found = inspect_directory(tmp_path / "theirs")
    assert (found["kind"], found["verified"], found["resume"]) == ("adapter", None, None)
    assert found["config"]["r"] == 2 and found["trainable"]["parameters"] > 0
    merged = inspect_directory(
        write_merged_model([finished_run], tmp_path / "m", max_shard_size="20KB")
    )
    assert merged["kind"] == "model" and len(merged["tensors"]) == 41
    assert merged["config"]["id2label"] == {"0": "negative", "1": "positive"}
    assert inspect_directory(tiny_model)["kind"] == "model"


def test_what_trainer_saves_beside_its_checkpoints_is_called_by_what_it_is(
    finished_run, trainers, tmp_path
):
    """save_model writes training_args.bin, too; a full fine-tune's checkpoint is a model."""
    shutil.copytree(trainers, tmp_path / "saved")
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "saved" / name).unlink()
    assert inspect_directory(tmp_path / "saved")["kind"] == "adapter"
    full = write_merged_model([finished_run], tmp_path / "checkpoint-2")
    for name in ("trainer_state.json", "optimizer.pt", "training_args.bin"):
        shutil.copy(trainers / name, full)
    found = inspect_directory(full)
    assert (found["kind"], found["position"]["step"], len(found["tensors"])) == ("model", 2, 41)


def test_a_base_that_is_not_on_this_machine_is_not_looked_for(run_copy):
    path = run_copy / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "no-such/model"}))
    found = inspect_directory(run_copy)
    assert found["trainable"]["parameters"] > 0 and found["problems"] == []


def test_a_setting_that_minilora_refuses_is_a_problem_of_the_adapter(run_copy):
    path = run_copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))
    found = inspect_directory(run_copy)
    assert "peft_type is 'IA3'" in found["problems"][0] and found["position"]["finished"]


def test_an_adapters_broken_tensors_are_a_problem(run_copy):
    (run_copy / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert "is damaged" in inspect_directory(run_copy)["problems"][0]


def test_tensors_that_are_not_finite_are_a_problem_and_the_json_stays_json(run_copy, command):
    file = run_copy / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    found = json.loads(command("inspect", run_copy, "--json").out, parse_constant=pytest.fail)
    assert found["problems"] == [f"{run_copy}: {name} holds NaN or infinity"]
    assert "norm: null" in command("inspect", run_copy, "--tensors").out


def test_the_command_prints_a_report_and_one_json_object(finished_run, command):
    result = command("inspect", finished_run, "--tensors")
    assert result.code == 0 and f"path: {finished_run}\nkind: run\n" in result.out
    report = yaml.safe_load(result.out.rpartition("\n{")[0])
    assert report["resume"]["max_steps"] == 6
    shapes = {tensor["name"]: tensor["shape"] for tensor in report["tensors"]}
    assert [4, 32] in shapes.values() and len(shapes) == len(report["tensors"])
    assert result.summary()["verified"] is True
    whole = command("inspect", finished_run, "--json")
    assert json.loads(whole.out) == json.loads(json.dumps(inspect_directory(finished_run)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["."], "none of the known kinds: looked for run.json"),
        (["file"], "file is a file: give a directory"),
        ([], "give one PATH, or two with --diff A B"),
        (["--diff", ".", "."], "none of the known kinds"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = command("inspect", *flags)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 2 and len(errors) == 1 and message in errors[0], result.err
    assert not result.out


def test_no_model_is_built(finished_run):
    """Not even the classes of models are imported."""
    code = (
        "import sys; from minilora.trained.directory import inspect_directory\n"
        f"inspect_directory({str(finished_run)!r})\n"
        "assert not [m for m in sys.modules if m.startswith('transformers.models.bert')]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_checkpoint_of_trainers_is_compared_with_ours(trainers, finished_run, command):
    """Its generators are arrays, tuples and tensors."""
    for other in (trainers, finished_run / "checkpoint-6"):
        found = command("inspect", "--diff", trainers, other)
        assert found.code == 0, found.err
        assert bool(found.summary()["tensors"]) == (other != trainers)


@pytest.mark.parametrize(
    "row", ["nonsense", "[]", "{}", '{"step": "3"}', '{"step": [1]}', '{"step": 1, "step": 2}', ""]
)
def test_damaged_rows_are_a_problem_and_no_traceback(row, run_copy, finished_run, command):
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    assert "metrics.jsonl" in inspect_directory(run_copy)["problems"][0]
    refused = command("inspect", "--diff", run_copy, finished_run)
    assert refused.code == 2 and refused.err.count("error: ") == 1


def test_an_endless_link_is_not_there(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(MiniloraError, match="link is not there"):
        inspect_directory(tmp_path / "link")
