"""What only the real torchrun does: it starts processes anew, passes signals on, and ends them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import safetensors.torch

from minilora.lora.peft_files import WEIGHTS_NAME
from minilora.training.checkpoint import latest_checkpoint
from tests.conftest import Finished, read_rows
from tests.test_several_processes import assert_equal, flags_of

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SECONDS = 180  # that nothing here may take, however busy the machine


class Torchrun:
    """A running `torchrun <how> -m <module> <flags>`, and every process it has started."""

    def __init__(self, how, module, *flags, doom=None, before=(), **environment):
        self.mark = f"MARK_OF_A_TEST={uuid.uuid4()}"
        words = [*before, *TORCHRUN, *how, "-m", module, *flags]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={
                **os.environ,
                **dict([self.mark.split("=")]),
                "DOOM": str(doom or ""),
                **environment,
            },
        )

    def processes(self) -> dict[int, str]:
        """The command of each process that is alive."""
        found = {}
        for place in Path("/proc").iterdir():
            try:
                if self.mark in (place / "environ").read_text(errors="replace").split("\0"):
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
            except (OSError, ValueError):
                pass
        return found

    def ranks(self) -> list[int]:
        """The processes that torchrun started, in the order of their start."""
        return sorted(
            pid for pid, line in self.processes().items() if "distributed.run" not in line
        )

    def wait(self, seconds=SECONDS) -> Finished:
        """How it ended. No process is left."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"torchrun hangs:\n{err}")
        deadline = time.monotonic() + 5
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        return Finished(self.process.returncode, out, err)


def torchrun(*given, seconds=SECONDS, **how) -> Finished:
    return Torchrun(*given, **how).wait(seconds)


def lines(finished):
    return [line for line in finished.err.splitlines() if line.startswith("error: ")]


def until(is_so, seconds=SECONDS):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def flags(tiny_model, sentences):
    """Of a run of 60 steps of 20 ms, that evaluates and saves after each fifth."""
    settings = {"max_steps": 60, "per_device_train_batch_size": 4, "validation_file": sentences[1]}
    settings |= {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps"}
    settings |= {"eval_steps": 5, "logging_steps": 1, "per_device_eval_batch_size": 2}
    words = flags_of(tiny_model, sentences[0], "", **settings, lora_dropout=0.1)
    at = words.index("--output_dir")
    return words[:at] + words[at + 2 :]


TWO = ("--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    finished = torchrun(TWO, "minilora.train", *flags, "--output_dir", out)
    assert finished.code == 0 and finished.summary()["global_step"] == 60, finished.err
    return out


def assert_same_run(out, undisturbed):
    theirs = safetensors.torch.load_file(undisturbed / WEIGHTS_NAME)
    assert_equal(safetensors.torch.load_file(out / WEIGHTS_NAME), theirs, 0)
    assert read_rows(out) == read_rows(undisturbed)
    record = json.loads((out / "run.json").read_text())
    assert "result" in record


def test_a_rank_killed_at_ten_random_moments_changes_no_bit(flags, undisturbed, tmp_path):
    draw = random.Random(0)
    dooms = [[draw.randrange(2), "in step", draw.uniform(0, 0.15)] for _ in range(5)]
    dooms += [[draw.randrange(2), "from the start", draw.uniform(0, 3)] for _ in range(2)]
    dooms += [[0, "in save", 0], [0, "in evaluation", 0], [1, "in evaluation", 0]]
    draw.shuffle(dooms)
    doom, out = tmp_path / "doom.json", tmp_path / "out"
    doom.write_text(json.dumps(dooms))
    how = ("--max_restarts", "10", *TWO)
    where = ("--output_dir", out)
    finished = torchrun(how, "tests.doomed", *flags, *where, doom=doom, seconds=3 * SECONDS)
    assert finished.code == 0, finished.err
    killed = (tmp_path / "doom.json.log").read_text().splitlines()
    assert killed == [f"{start} {where}" for start, (_, where, _) in enumerate(dooms)]
    assert "resuming" in finished.err
    assert_same_run(out, undisturbed)


def test_a_kill_from_outside_is_survived_three_times(flags, undisturbed, tmp_path):
    out, draw = tmp_path / "out", random.Random()
    running = Torchrun(("--max_restarts", "3", *TWO), "tests.doomed", *flags, "--output_dir", out)
    for step in (5, 15, 25):
        until(lambda step=step: (out / f"checkpoint-{step}").exists())
        time.sleep(draw.uniform(0, 0.1))
        os.kill(draw.choice(running.ranks()), signal.SIGKILL)
    finished = running.wait()
    assert finished.code == 0 and finished.err.count("resuming") == 3, finished.err
    assert_same_run(out, undisturbed)


def test_a_loss_beyond_the_restarts_is_one_line_and_the_end(flags, tmp_path):
    doom = tmp_path / "doom.json"
    doom.write_text(json.dumps([[1, "in step", 0.1]]))
    where = ("--output_dir", tmp_path / "out")
    finished = torchrun(TWO, "tests.doomed", *flags, *where, doom=doom)
    assert finished.code != 0 and (tmp_path / "doom.json.log").exists()
    (line,) = lines(finished)
    assert line.startswith("error: rank 1 (at ") and "does not answer rank 0" in line


def test_sigterm_saves_and_ends_all_and_a_resume_changes_no_bit(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    running = Torchrun(TWO, "tests.doomed", *flags, "--output_dir", out)
    until(lambda: (out / "checkpoint-10").exists())
    running.process.send_signal(signal.SIGTERM)
    finished = running.wait()
    assert "stopped at step" in finished.out
    step = finished.summary()["global_step"]
    assert 10 <= step < 60 and latest_checkpoint(out) == out / f"checkpoint-{step}"
    assert not lines(finished), finished.err
    again = torchrun(TWO, "minilora.train", "--resume_from_checkpoint", out)
    assert again.code == 0, again.err
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_hangs_is_named_within_the_timeout(who, flags, tmp_path):
    out = tmp_path / "out"
    how = (*flags, "--output_dir", out, "--ddp_timeout", 10)
    running = Torchrun(TWO, "tests.doomed", *how)
    until(lambda: (out / "checkpoint-10").exists())
    start = time.monotonic()
    os.kill(running.ranks()[who], signal.SIGSTOP)
    finished = running.wait()  # torchrun gives it 30 s to end
    assert finished.code != 0 and time.monotonic() - start > 10
    (line,) = lines(finished)
    assert line.startswith(f"error: rank {who} (at ") and f"answer rank {1 - who} (at " in line


def test_bad_input_is_one_line_and_the_end_of_all(flags, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a file").touch()
    (tmp_path / "two.tsv").write_text("text\tlabel\na good film\tpositive\na bad film\tnegative\n")
    bad = {
        ("--learning_rate", "-1"): "learning_rate",
        ("--train_file", tmp_path / "absent.tsv"): "absent.tsv",
        ("--train_file", tmp_path / "two.tsv"): "3 processes for 2 examples",
        ("--output_dir", tmp_path / "full"): "is not empty",
    }
    for number, (wrong, said) in enumerate(bad.items()):
        start = time.monotonic()
        three = ("--standalone", "--nproc_per_node", "3")
        place = ("--output_dir", tmp_path / str(number))
        finished = torchrun(three, "minilora.train", *flags, *place, *wrong)
        (line,) = lines(finished)
        assert finished.code != 0 and said in line
        assert time.monotonic() - start < SECONDS / 2


def test_a_port_in_use_ends_at_once(flags, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        how = ("--nproc_per_node", "2", "--master_port", taken.getsockname()[1])
        start = time.monotonic()
        finished = torchrun(how, "minilora.train", *flags, "--output_dir", tmp_path / "out")
    assert finished.code != 0 and time.monotonic() - start < SECONDS / 2
    assert "EADDRINUSE" in finished.err or "in use" in finished.err
    assert not (tmp_path / "out").exists()


def test_evaluate_and_predict_write_once_what_one_process_writes(
    finished_run, sentences, command, tmp_path
):
    alone = command("evaluate", finished_run, "--file", sentences[0])
    finished = torchrun(TWO, "minilora.evaluate", finished_run, "--file", sentences[0])
    assert finished.code == 0 and finished.out.count("eval_loss") == 1, finished.err
    ours, theirs = finished.summary(), alone.summary()
    assert {n: v for n, v in ours.items() if "second" not in n and "runtime" not in n} == {
        n: v for n, v in theirs.items() if "second" not in n and "runtime" not in n
    }
    how = (finished_run, "--file", sentences[0], "--per_device_eval_batch_size", 4)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert command("predict", *how, "--output", one).code == 0
    finished = torchrun(TWO, "minilora.predict", *how, "--output", two)
    assert finished.code == 0 and two.read_bytes() == one.read_bytes(), finished.err
    finished = torchrun(TWO, "minilora.predict", *how)
    assert finished.out.splitlines()[:-1] == one.read_text().splitlines()


@pytest.fixture
def hosts():
    """What starts a command on each of two hosts, which are network namespaces joined by a cable;
    the first is 10.99.0.1. And a function that cuts the cable, or mends it.
    """
    names = [f"minilora{os.getpid()}{side}" for side in "ab"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)

    try:
        for name in names:
            ip("netns", "add", name)
        first, second = names
        ip("link", "add", "end0", "netns", first, "type", "veth", "peer", "end1", "netns", second)
        for name, end, address in ((first, "end0", "10.99.0.1"), (second, "end1", "10.99.0.2")):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
    except (OSError, subprocess.SubprocessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces cannot be made here: {error}")
    inside = [("ip", "netns", "exec", name) for name in names]
    yield inside, lambda state: ip("-n", first, "link", "set", "end0", state)
    for name in names:
        ip("netns", "del", name)


def on_both(inside, module, *flags, before=((), ())):
    """torchrun on both hosts, one process on each."""
    address = ("--master_addr", "10.99.0.1", "--master_port", "29511")
    for node in (0, 1):
        how = ("--nnodes", "2", "--nproc_per_node", "1", "--node_rank", node, *address)
        words = (*inside[node], *before[node])
        yield Torchrun(how, module, *flags, before=words, GLOO_SOCKET_IFNAME=f"end{node}")


def rows_in(out):
    return (out / "metrics.jsonl").read_bytes().count(b"\n")


def test_two_hosts_whose_link_is_cut_for_a_while_end_with_the_same_bits(
    hosts, flags, undisturbed, tmp_path
):
    inside, link = hosts
    out = tmp_path / "out"
    how = (*flags, "--output_dir", out, "--ddp_timeout", 60)
    running = list(on_both(inside, "tests.doomed", *how))
    until(lambda: (out / "checkpoint-10").exists())
    link("down")
    time.sleep(1)
    before = rows_in(out)
    time.sleep(3)
    assert rows_in(out) == before < 60  # it stands still
    link("up")
    first, second = (one.wait() for one in running)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert_same_run(out, undisturbed)


def test_a_directory_that_one_host_does_not_see_is_refused_in_one_line(hosts, flags, tmp_path):
    inside, _ = hosts
    mine = f'mount -t tmpfs none {tmp_path} && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", mine, "sh", "true"]).returncode:
        pytest.skip("a host of one's own mounts cannot be made here")
    how = (*flags, "--output_dir", tmp_path / "out", "--ddp_timeout", 60)
    before = ((), ("unshare", "-m", "sh", "-c", mine, "sh"))
    start = time.monotonic()
    running = list(on_both(inside, "minilora.train", *how, before=before))
    first, second = (one.wait() for one in running)
    assert first.code != 0 and second.code != 0 and time.monotonic() - start < SECONDS / 2
    (line,) = [*lines(first), *lines(second)]
    assert line in first.err and "rank 1 does not see what rank 0 writes to" in line
