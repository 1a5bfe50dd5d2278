"""`minilora COMMAND` beside `python -m minilora.COMMAND`."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from minilora import __main__, __version__
from tests.test_architecture import COMMANDS


def test_the_script_that_pip_installs_is_this():
    scripts = [s for s in entry_points(group="console_scripts") if s.name == "minilora"]
    if not scripts:
        pytest.skip("installed before there was a script: pip install -e . again")
    assert scripts[0].load() is __main__.main


def test_every_command_is_one_of_the_scripts():
    assert set(__main__.COMMANDS) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_answers_for_its_help(name):
    flags = [sys.executable, "-m", "minilora", name, "--help"]
    done = subprocess.run(flags, capture_output=True, text=True)
    assert done.returncode == 0 and f"minilora.{name}" in done.stdout


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["minilora", *words])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return ended.value.code, *capsys.readouterr()


def test_the_version_and_the_commands_are_told(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version") == (0, f"minilora {__version__}\n", "")
    code, told, _ = call(monkeypatch, capsys)
    assert code == 0 and all(name in told for name in COMMANDS)


def test_an_unknown_command_or_flag_names_the_nearest(monkeypatch, capsys):
    code, _, told = call(monkeypatch, capsys, "trian")
    assert code == 2 and "'trian' is no command; did you mean train?" in told
    code, _, told = call(monkeypatch, capsys, "train", "--learning_rat", "1")
    assert code == 2 and "did you mean --learning_rate?" in told


def test_a_command_runs_by_its_name(monkeypatch, capsys, finished_run):
    code, told, _ = call(monkeypatch, capsys, "inspect", str(finished_run), "--json")
    assert code == 0 and json.loads(told)["kind"] == "run"


def test_env_names_what_a_report_should(command):
    done = command("env")
    assert done.code == 0 and done.summary()["minilora"] == __version__
    assert {"torch", "transformers", "cpu_capability", "num_threads"} <= done.summary().keys()
    assert f"torch           {done.summary()['torch']}\n" in done.out
