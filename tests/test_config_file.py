"""--config: the flags of a command from a file."""

import json

import pytest
import yaml

from minilora.command import Parser
from minilora.errors import MiniloraError
from minilora.train import parse_arguments


def write(path, values):
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return str(path)


VALUES = {
    "learning_rate": 3e-4,
    "max_steps": 7,
    "eval_on_start": True,
    "hf_parity": False,
    "train_file": "data/--odd name.tsv",
    "class_weights": ["negative=2"],
    "warmup_steps": 0.1,
    "data_seed": None,
}
LORA = {
    "r": 4,
    "target_modules": ["0.attention.self.query"],  # as a flag's only word it would be a pattern
    "exclude_modules": ".*key",
    "rank_pattern": {"query": 2},
    "trainable_token_indices": {"embeddings": [1]},  # which no flag can say
    "init_lora_weights": "pissa_niter_4",
}


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_a_files_values_arrive_as_they_are(tmp_path, name):
    path = write(tmp_path / name, VALUES | LORA)
    given = {name: value for name, value in VALUES.items() if value is not None}
    assert parse_arguments(["--config", path]) == (given, LORA)


def test_a_flag_wins_over_the_file_wherever_it_stands(tmp_path):
    path = write(tmp_path / "c.json", {"r": 4, "seed": 1, "target_modules": ["query", "key"]})
    flags = ["--seed=2", "--config", path, "--target_modules", "value"]
    assert parse_arguments(flags) == ({"seed": 2}, {"r": 4, "target_modules": ["value"]})
    assert parse_arguments([f"--config={path}", "--r", "8"])[1]["r"] == 8


def test_yaml_is_read_as_people_write_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning-rate: 1e-3  # a string, to YAML 1.1\nr: 4\nhf_parity: yes\n")
    assert parse_arguments(["--config", str(path)]) == (
        {"learning_rate": 1e-3, "hf_parity": True},
        {"r": 4},
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"lerning_rate": 1}', "'lerning_rate' is no flag; did you mean learning_rate?"),
        ('{"config": "other.json"}', "'config' is no flag"),
        ('{"r": 1, "r": 2}', "a name occurs twice"),
        ('{"seed": "many"}', "seed is 'many'"),
        ("[1]", "holds no names with values"),
        ("{", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, command, text, fault):
    path = tmp_path / "c.json"
    path.write_text(text)
    done = command("train", "--config", path)
    assert done.code == 2 and fault in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["r: 1\nr: 2\n", "r: [1\n", "!!python/name:os.system", "? [r]\n: 1"]
)
def test_yaml_that_is_wrong_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(MiniloraError, match="--config"):
        parse_arguments(["--config", str(path)])


@pytest.mark.parametrize("value", [{"r": True}, {"r": [4]}, {"r": 0}, {"bias": "some"}])
def test_a_value_is_checked_as_that_of_a_flag_is(tmp_path, command, value):
    done = command("train", "--config", write(tmp_path / "c.json", value))
    assert done.code == 2 and f"{next(iter(value))} is " in done.err


def test_a_missing_file_and_a_device_are_refused(command, tmp_path):
    for path in (tmp_path / "none.json", "/dev/zero", tmp_path):
        done = command("train", "--config", path)
        assert done.code == 2 and f"--config {path}" in done.err


def test_the_flags_of_other_commands_come_from_a_file_too(tmp_path):
    parser = Parser("some", usage=None)
    parser.add_argument("--weights", nargs="+", type=float)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dtype", choices=("float32",), default="float32")
    parser.add_argument("--json", action="store_true")
    values = {"weights": [1, 0.5], "output_dir": 3, "json": True}
    asked = parser.parse_args(["--config", write(tmp_path / "c.json", values)])
    assert (asked.weights, asked.output_dir, asked.json) == ([1.0, 0.5], "3", True)
    for wrong in ({"dtype": "int4"}, {"weights": []}, {"output_dir": [1]}, {"json": "perhaps"}):
        with pytest.raises(MiniloraError, match=f"{next(iter(wrong))} is"):
            parser.parse_args(["--config", write(tmp_path / "d.json", values | wrong)])


def test_somebodys_run_is_repeated_with_one_flag(command, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--config", finished_run / "run.json", "--output_dir", tmp_path / "again")
    assert command("train", *flags).code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (finished_run / name).read_bytes()
    assert command("train", *flags[:2], "--max_steps", "1").code == 0  # nor in its place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "runs"]


@pytest.mark.parametrize("name", ["evaluate", "predict", "merge", "inspect"])
def test_of_a_run_other_commands_take_what_they_have(name, finished_run, tmp_path, command):
    """A name that train does not know either is refused all the same."""
    own = {
        "evaluate": [finished_run, "--file", finished_run / "none.tsv"],
        "predict": [finished_run, "--file", finished_run / "none.tsv"],
        "merge": [finished_run, "--output_dir", tmp_path / "merged"],
        "inspect": [finished_run],
    }[name]
    done = command(name, *own, "--config", finished_run / "run.json")
    assert "is no flag" not in done.err and (done.code == 0 or "none.tsv" in done.err)
    record = json.loads((finished_run / "run.json").read_text())
    record["arguments"]["of_tomorrow"] = 1
    done = command(name, *own, "--config", write(tmp_path / "other.json", record))
    assert done.code == 2 and "'of_tomorrow' is no flag" in done.err


def test_a_flags_second_name_is_one_here_too(tmp_path):
    assert parse_arguments(["--config", write(tmp_path / "c.yaml", {"lora_r": 4})])[1] == {"r": 4}
    for twice in ({"lora_r": 4, "r": 2}, {"max-steps": 1, "max_steps": 2}):
        with pytest.raises(MiniloraError, match="under another spelling, too"):
            parse_arguments(["--config", write(tmp_path / "d.json", twice)])


def test_a_column_may_be_a_number_as_it_may_for_the_flag(tmp_path):
    path = write(tmp_path / "c.yaml", {"text_column": 1, "label_column": 0})
    assert parse_arguments(["--config", path])[0] == {"text_column": "1", "label_column": "0"}
