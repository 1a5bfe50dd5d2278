"""What every command does around its work: its flags' spelling, its last words, its signals."""

import os
import re
import signal
import threading

import pytest
import torch

from minilora import LoraConfig, MiniloraError, add_adapter, trainable_parameters
from minilora.command import Parser, run_command, stop_signals
from tests.conftest import tiny_classifier


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate", "--learning-rate=a-b"])
def test_a_dash_in_a_flag_is_an_underscore_and_one_in_a_value_is_not(flag):
    parser = Parser("command", usage=None)
    parser.add_argument("--learning_rate")
    words = [flag] if "=" in flag else [flag, "a-b"]
    assert parser.parse_args(words).learning_rate == "a-b"


def raises(error: BaseException):
    def main() -> int:
        raise error

    return main


NO_MEMORY = (
    "error: not enough memory: give a lower rank, batch size or max_length"
    " (see docs/troubleshooting.md#out-of-memory)\n"
)


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: 3, 3, ""),
        (raises(MiniloraError("bad\n  file")), 2, "error: bad file\n"),
        (raises(OSError(28, "No space left", "out/a")), 1, "error: out/a: No space left\n"),
        (raises(MemoryError()), 2, NO_MEMORY),
        (
            raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
            2,
            NO_MEMORY,
        ),
        (raises(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, ""),
    ],
)
def test_an_end_is_one_line_and_an_exit_code(main, code, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == code and capsys.readouterr().err == said


def test_a_line_has_a_length_that_can_be_read(capsys):
    with pytest.raises(SystemExit):
        run_command(raises(MiniloraError("x" * 100_000)))
    assert len(capsys.readouterr().err) < 5000


def test_what_a_model_of_transformers_cannot_take_is_one_line_and_our_layer_s_fault_is_not(capsys):
    model = tiny_classifier()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: model(torch.tensor([[10_000]])))
    refusal = r"error: bert of transformers cannot take what it is given \((Runtime|Index)Error: .*"
    assert ended.value.code == 2 and re.fullmatch(refusal, capsys.readouterr().err.strip())
    add_adapter(model, LoraConfig(r=2))
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data[:, :1]
    with pytest.raises(RuntimeError):
        run_command(lambda: model(torch.tensor([[1]])))


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(AssertionError):
        run_command(raises(AssertionError()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_ends_the_process(number):
    child = os.fork()
    if child == 0:
        with stop_signals() as received:
            signal.raise_signal(number)
            if received == [number]:
                signal.raise_signal(number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


def test_signals_are_as_before_afterwards_and_left_alone_in_a_thread():
    before = signal.getsignal(signal.SIGINT)
    with stop_signals():
        assert signal.getsignal(signal.SIGINT) is not before
    seen = []

    def work():
        with stop_signals() as received:
            seen.append((received, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], before)] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("evaluate out --fil dev.tsv", "required: --file; --fil is no flag; did you mean --file?"),
        ("merge out --output-dri m", "--output_dri is no flag; did you mean --output_dir?"),
        ("train some --lerning_rate 1", "some --lerning_rate 1; did you mean --learning_rate?"),
        ("train --r four --lerning_rate 1", "--lerning_rate is no flag; did you mean --learning"),
    ],
)
def test_a_flag_that_is_misspelt_is_named_whatever_else_is_wrong(command, line, told):
    done = command(*line.split())
    assert done.code == 2 and told in done.err and done.err.count("\n") == 1
