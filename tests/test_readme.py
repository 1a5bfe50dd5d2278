"""What the README says beyond its blocks, which tests/test_docs.py runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from minilora.train import parse_arguments

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) < 200


def test_the_two_commands_of_the_first_block_are_the_ones_ci_runs():
    commands = re.search(r"```\n(.*?)```", README.read_text(), re.S)
    assert commands and commands.group(1).splitlines() == [
        'pip install -c constraints.txt -e ".[demo]" && python -m minilora.train',
        'pip install -c constraints.txt -e ".[test]" && python -m pytest',
    ]


def test_torchrun_takes_r_for_its_own_but_not_behind_dashes(capsys):
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["-m", "minilora.train", "--r", "4"])
    assert "--r could match --rdzv" in capsys.readouterr().err
    asked = get_args_parser().parse_args(["-m", "minilora.train", "--", "--r", "4"])
    assert parse_arguments([word for word in asked.training_script_args if word != "--"])[1]


@pytest.mark.slow
def test_the_example_proves_a_resume(tiny_model, sentences):
    example = README.parent / "examples" / "prove_a_resume.py"
    flags = ["--model_name_or_path", tiny_model, "--train_file", sentences[0], "--device", "cpu"]
    result = subprocess.run([sys.executable, example, *flags], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "12 losses equal, bit for bit: True" in result.stdout
