"""Processes that train together and cannot, or one of which is lost: one line, and no hung process.

In forks of this process. What only the real torchrun does is in test_torchrun.py.
"""

import os
import shutil
import signal
import socket
import time

import pytest
import safetensors.torch

from minilora.command import stop_signals
from minilora.files import LOCK_NAME
from minilora.lora.peft_files import WEIGHTS_NAME
from minilora.training import checkpoint, loop, record
from tests.conftest import read_rows, write_sentences
from tests.forked import run_forked
from tests.ranks import run_ranks
from tests.test_several_processes import assert_equal, flags_of

KILLED = -signal.SIGKILL


def lines(finished):
    """What was said of an error, by any rank."""
    texts = [line for one in finished for line in one.err.splitlines()]
    assert not [line for line in texts if line.startswith("Traceback")], texts
    return [line for line in texts if line.startswith("error: ")]


def before_step(step, do, who):
    """What makes rank `who` do something before an optimizer step."""

    def prepare(rank):
        as_ever = loop.training_step

        def hindered(training, *arguments):
            if rank == who and training.state.global_step == step - 1:
                do()
            return as_ever(training, *arguments)

        loop.training_step = hindered

    return prepare


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def flags(tiny_model, sentences, tmp_path):
    return flags_of(tiny_model, sentences[0], tmp_path / "out", per_device_train_batch_size=4)


@pytest.mark.parametrize("who", [0, 2])
def test_an_error_of_one_rank_is_one_line_of_rank_0_and_the_end_of_all(who, flags, tmp_path):
    own = lambda rank: ("--train_file", tmp_path / "absent.tsv") if rank == who else ()  # noqa: E731
    start = time.monotonic()
    finished = run_ranks(3, "train", *flags, own_flags=own)
    assert [one.code for one in finished] == [2, 2, 2]
    (line,) = lines(finished)
    assert "absent.tsv" in line and line in finished[0].err
    assert time.monotonic() - start < 15


def test_an_error_of_the_disk_stays_one_on_all(flags, tmp_path):
    def prepare(rank):
        def full(*given):
            raise OSError(28, "No space left on device")

        if rank == 0:
            checkpoint.commit_directory = full

    finished = run_ranks(2, "train", *flags, "--save_strategy", "epoch", prepare=prepare)
    assert [one.code for one in finished] == [1, 1]
    (line,) = lines(finished)
    assert "No space left" in line and "make room" in line and line in finished[0].err


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_rank_is_named_by_the_first_that_is_left(who, flags):
    finished = run_ranks(3, "train", *flags, prepare=before_step(4, killed, who))
    assert [one.code for one in finished] == [KILLED if rank == who else 1 for rank in range(3)]
    (line,) = lines(finished)
    first = 1 if who == 0 else 0
    assert f"rank {who} (at step 4) does not answer rank {first}" in line
    assert line in finished[first].err


def test_a_rank_that_hangs_is_named_within_the_timeout(flags):
    def hang():
        time.sleep(8)
        killed()

    how = (*flags, "--ddp_timeout", 4)  # a busy machine may keep a rank waiting for one or two
    finished = run_ranks(2, "train", *how, prepare=before_step(4, hang, who=1))
    assert [one.code for one in finished] == [1, KILLED]
    (line,) = lines(finished)
    assert "rank 1 (at step 4) does not answer rank 0 (at step 4)" in line and "imed out" in line


def other_arguments(place):
    return ("--learning_rate", 0.5)


def other_data(place):
    write_sentences(place / "train.tsv", 44, seed=3)
    return ()


def other_base(place):
    weights = safetensors.torch.load_file(place / "model" / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in weights.items()}
    safetensors.torch.save_file(changed, place / "model" / "model.safetensors", {"format": "pt"})
    return ()


def other_version(place):
    return ()


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (other_arguments, "learning_rate"),
        (other_data, "data"),
        (other_base, "base"),
        (other_version, "minilora"),
    ],
)
def test_ranks_that_disagree_are_refused_and_what_differs_is_named(
    other, name, tiny_model, sentences, tmp_path
):
    """Each host has a base and data of its own, under the same names."""
    for rank in (0, 1):
        shutil.copytree(tiny_model, tmp_path / str(rank) / "model")
        shutil.copy(sentences[0], tmp_path / str(rank) / "train.tsv")
    own = other(tmp_path / "1")

    def prepare(rank):
        os.chdir(tmp_path / str(rank))
        if rank and other is other_version:
            record.__version__ = "0.0.1"

    flags = flags_of("model", "train.tsv", tmp_path / "out")
    finished = run_ranks(2, "train", *flags, prepare=prepare, own_flags=lambda rank: own * rank)
    assert [one.code for one in finished] == [2, 2]
    (line,) = lines(finished)
    assert "rank 1 has" in line and f"as {name}, rank 0" in line and line in finished[0].err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LOCK_NAME}


def test_more_ranks_than_examples_are_refused(tiny_model, tmp_path):
    write_sentences(tmp_path / "train.tsv", 2, seed=1)
    finished = run_ranks(3, "train", *flags_of(tiny_model, tmp_path / "train.tsv", tmp_path / "o"))
    assert [one.code for one in finished] == [2, 2, 2]
    assert lines(finished) == [
        "error: 3 processes for 2 examples: start fewer (see docs/several_processes.md)"
    ]


def test_a_directory_that_not_all_see_is_refused(flags, tmp_path):
    own = lambda rank: ("--output_dir", tmp_path / "other") if rank else ()  # noqa: E731
    finished = run_ranks(2, "train", *flags, own_flags=own)
    assert [one.code for one in finished] == [2, 2]
    (line,) = lines(finished)
    assert f"rank 1 does not see what rank 0 writes to {tmp_path / 'out'}" in line


def test_processes_without_a_common_directory_are_refused(flags):
    at = flags.index("--output_dir")
    finished = run_ranks(2, "train", *flags[:at], *flags[at + 2 :])
    assert [one.code for one in finished] == [2, 2]
    (line,) = lines(finished)
    assert "give --output_dir" in line


def test_a_port_in_use_is_one_line(flags):
    """Where rank 0 listens, and not torchrun."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def prepare(rank):
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(taken.getsockname()[1])

        finished = run_ranks(1, "train", *flags, prepare=prepare)
    (line,) = lines(finished)
    assert finished[0].code == 2 and "cannot join" in line and "in use" in line


EACH_THIRD = ("--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 1)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, sentences, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    flags = flags_of(tiny_model, sentences[0], out, per_device_train_batch_size=4)
    assert not any(one.code for one in run_ranks(2, "train", *flags, *EACH_THIRD))
    return out


def after_a_loss(counts=(1, 1)):
    """What tells a fork that torchrun has started it once more."""

    def prepare(rank):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(counts[rank])

    return prepare


def killed_in_its_commit(of_step):
    """What kills rank 0 before the last file of a checkpoint is written."""

    def prepare(rank):
        as_ever = checkpoint.commit_directory

        def hindered(path, files):
            if path.name == f"checkpoint-{of_step}":
                *whole, _last = files
                kept = {name: files[name] for name in whole}

                class Deadly(dict):
                    def items(self):
                        yield from kept.items()
                        killed()

                files = Deadly(files)
            as_ever(path, files)

        checkpoint.commit_directory = hindered

    return prepare


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        pytest.param(before_step(2, killed, who=1), [], marks=pytest.mark.slow),
        (before_step(4, killed, who=0), ["checkpoint-3"]),
        pytest.param(killed_in_its_commit(6), ["checkpoint-3"], marks=pytest.mark.slow),
    ],
)
def test_after_a_loss_the_same_command_goes_on_to_the_same_bits(
    fault, left, flags, undisturbed, tmp_path
):
    flags = [*flags, *EACH_THIRD]
    out = tmp_path / "out"
    lost = run_ranks(2, "train", *flags, prepare=fault)
    assert KILLED in [one.code for one in lost] and 0 not in [one.code for one in lost]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == left
    assert bool(list(out.glob(".tmp-checkpoint-*"))) == ("commit" in fault.__qualname__)
    # Each host counts its own restarts.
    again = run_ranks(2, "train", *flags, prepare=after_a_loss(counts=(0, 1)))
    assert [one.code for one in again] == [0, 0], lines(again)
    assert not list(out.glob(".tmp-checkpoint-*"))
    theirs = safetensors.torch.load_file(undisturbed / WEIGHTS_NAME)
    assert_equal(safetensors.torch.load_file(out / WEIGHTS_NAME), theirs, 0)
    assert read_rows(out) == read_rows(undisturbed)


def test_without_a_loss_the_same_command_is_refused(flags):
    """The control of the test above."""
    run_ranks(2, "train", *flags, prepare=before_step(2, killed, who=1))
    again = run_ranks(2, "train", *flags)
    assert [one.code for one in again] == [2, 2] and "is not empty" in lines(again)[0]


def test_a_resume_into_a_new_directory_that_is_lost_begins_at_the_old_checkpoint(flags, tmp_path):
    flags = [*flags, "--save_strategy", "steps", "--save_steps", 4]
    assert not any(one.code for one in run_ranks(2, "train", *flags))
    whole = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS_NAME)
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "out" / "checkpoint-4", copied)
    go_on = ("--resume_from_checkpoint", copied, "--output_dir", tmp_path / "new")
    lost = run_ranks(2, "train", *go_on, prepare=before_step(6, killed, who=0))
    assert lost[0].code == KILLED and (tmp_path / "new" / "run.json").exists()
    again = run_ranks(2, "train", *go_on, prepare=after_a_loss())
    assert [one.code for one in again] == [0, 0], lines(again)
    assert "at step 4" in again[0].err
    assert_equal(safetensors.torch.load_file(tmp_path / "new" / WEIGHTS_NAME), whole, 0)


def test_a_second_signal_under_torchrun_is_the_first_passed_on(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")

    def twice():
        with stop_signals() as received:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return len(received)

    assert run_forked(twice).code == 2


def test_evaluate_shares_its_file_and_has_the_numbers_of_one_process(finished_run, sentences):
    flags = ("--confusion_matrix",)
    alone = run_forked("evaluate", finished_run, "--file", sentences[0], *flags)
    first, *others = run_ranks(3, "evaluate", finished_run, "--file", sentences[0], *flags)
    assert first.code == 0 and not any(one.code or one.out or one.err for one in others), others
    assert without_times(first) == without_times(alone)
    assert first.out.splitlines()[:-1] == alone.out.splitlines()[:-1]


def without_times(finished):
    ends = ("runtime", "per_second")
    return {name: v for name, v in finished.summary().items() if not name.endswith(ends)}


def test_predict_shares_its_file_and_writes_the_bytes_of_one_process(
    finished_run, sentences, tmp_path
):
    how = (finished_run, "--file", sentences[0], "--per_device_eval_batch_size", 4)
    one, three = tmp_path / "one.jsonl", tmp_path / "three.jsonl"
    assert run_forked("predict", *how, "--output", one).code == 0
    first, *others = run_ranks(3, "predict", *how, "--output", three)
    assert first.code == 0 and not any(one.code or one.out or one.err for one in others), others
    assert three.read_bytes() == one.read_bytes() and three.read_bytes().count(b"\n") == 44
    assert run_ranks(2, "predict", *how)[0].out.encode().startswith(one.read_bytes())
    again = run_ranks(2, "predict", *how, "--output", three)
    assert [one.code for one in again] == [2, 2] and len(lines(again)) == 1
    assert three.read_bytes() == one.read_bytes()


def test_predict_by_several_is_of_a_file_that_is_the_same(finished_run, sentences, tmp_path):
    finished = run_ranks(2, "predict", finished_run, "-")
    assert [one.code for one in finished] == [2, 2] and "give --file F" in lines(finished)[0]
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        shutil.copy(sentences[rank], tmp_path / str(rank) / "texts.tsv")
    where = lambda rank: os.chdir(tmp_path / str(rank))  # noqa: E731
    for command in ("evaluate", "predict"):
        finished = run_ranks(2, command, finished_run, "--file", "texts.tsv", prepare=where)
        assert [one.code for one in finished] == [2, 2]
        (line,) = lines(finished)
        assert "as texts.tsv, rank 0" in line
