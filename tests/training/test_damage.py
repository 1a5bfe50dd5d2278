"""Damaged, swapped and forged checkpoints: named, they are refused; asked for the latest, they are
set aside and the older one is used, bit for bit.
"""

import copy
import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from minilora import MiniloraError, Training, load_checkpoint
from minilora.command import run_command
from minilora.training.checkpoint import read_checkpoint
from minilora.training.resume import plan_resume
from minilora.training.rng import rng_state
from tests.faults import saver

FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "minilora.json",
)
RESULT = ("adapter_model.safetensors", "metrics.jsonl", *(f"checkpoint-4/{n}" for n in FILES))


class Payload:
    """Unpickled by a careless reader, it makes a directory."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four steps that kept checkpoint-3 and checkpoint-4."""
    output_dir = tmp_path_factory.mktemp("damage") / "run"
    assert saver.run(output_dir) == 0
    return output_dir


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def contents(output_dir: Path) -> dict[str, bytes]:
    return {name: (output_dir / name).read_bytes() for name in RESULT}


def flip(file: Path, seed: int) -> None:
    data = bytearray(file.read_bytes())
    bit = random.Random(f"{file.name} {seed}").randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def empty(file: Path, seed: int) -> None:
    file.write_bytes(b"")


def truncate(file: Path, seed: int) -> None:
    file.write_bytes(file.read_bytes()[:-2])


def append(file: Path, seed: int) -> None:
    file.write_bytes(file.read_bytes() + b"!")


def remove(file: Path, seed: int) -> None:
    file.unlink()


def be_a_directory(file: Path, seed: int) -> None:
    file.unlink()
    file.mkdir()


def be_a_pipe(file: Path, seed: int) -> None:
    file.unlink()
    os.mkfifo(file)


def link_outside(file: Path, seed: int) -> None:
    """To the very same bytes: they are still somebody else's."""
    elsewhere = file.parent.parent.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def run_code(file: Path, seed: int) -> None:
    file.write_bytes(pickle.dumps(Payload(file.parent.parent.parent / "ran")))


def run_code_in_an_archive(file: Path, seed: int) -> None:
    torch.save({"state": Payload(file.parent.parent.parent / "ran")}, file)


def be_of_another_step(file: Path, seed: int) -> None:
    shutil.copy(file.parent.parent / "checkpoint-3" / file.name, file)


DAMAGES = {
    **{f"bit {seed} flipped": flip for seed in range(5)},
    "emptied": empty,
    "truncated": truncate,
    "appended to": append,
    "removed": remove,
    "a directory": be_a_directory,
    "a pipe": be_a_pipe,
    "a link to the same bytes outside": link_outside,
    "a pickle that runs code": run_code,
    "an archive that runs code": run_code_in_an_archive,
    "the same file of another step": be_of_another_step,
}
# The same bytes at both steps: nothing is changed by putting one in the other's place.
SAME = {("adapter_config.json", "the same file of another step")}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(name, damage, run, finished, capsys):
    if (name, damage) in SAME:
        pytest.skip("the same bytes in both checkpoints")
    seed = int(damage.split()[1]) if damage.startswith("bit") else 0
    DAMAGES[damage](run / "checkpoint-4" / name, seed)

    with pytest.raises(SystemExit) as ended:
        run_command(lambda: plan_resume(run / "checkpoint-4") and 0)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert name in lines[0] or (str(run / "checkpoint-4") in lines[0] and name == "minilora.json")

    assert saver.run(run) == 0
    assert "warning: checkpoint-4 is invalid and now named .invalid-" in capsys.readouterr().err
    assert [p for p in run.iterdir() if p.name.startswith(".invalid-checkpoint-4-")]
    assert contents(run) == contents(finished)
    assert not (run.parent / "ran").exists()


def test_a_payload_would_run_if_anybody_let_it(tmp_path):
    """Negative control: the pickles above are live."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def forge(checkpoint: Path, change) -> None:
    """Edit minilora.json as one would who knows how its checksum is made."""
    document = json.loads((checkpoint / "minilora.json").read_text())
    document.pop("sha256")
    change(document)
    own = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (checkpoint / "minilora.json").write_text(json.dumps({**document, "sha256": own}))


def rewrite(checkpoint: Path, name: str, value) -> None:
    """Put another value into a torch file, and its hash into the manifest."""
    torch.save(value, checkpoint / name)
    data = (checkpoint / name).read_bytes()
    described = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(checkpoint, lambda document: document["files"].update({name: described}))


def test_a_forged_manifest_that_changes_nothing_is_accepted(run):
    """Negative control: the refusals below are not of the forgery itself."""
    forge(run / "checkpoint-4", lambda document: None)
    read_checkpoint(run / "checkpoint-4")


def test_a_manifest_edited_by_hand_is_refused(run):
    file = run / "checkpoint-4" / "minilora.json"
    file.write_text(file.read_text().replace('"global_step": 4', '"global_step": 5'))
    with pytest.raises(MiniloraError, match=r"minilora\.json was changed after it was written"):
        read_checkpoint(run / "checkpoint-4")


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], 10**30])
def test_an_unknown_schema_version_is_refused(version, run):
    forge(run / "checkpoint-4", lambda document: document.update(schema_version=version))
    with pytest.raises(MiniloraError, match=r"minilora\.json has schema version"):
        read_checkpoint(run / "checkpoint-4")


FORGERIES = {
    "a count that is a text": lambda d: d["state"].update(global_step="4"),
    "a count that is a truth": lambda d: d["state"].update(epoch=True),
    "a negative count": lambda d: d["state"].update(step_in_epoch=-1),
    "a count no machine has": lambda d: d["state"].update(logged_step=10**30),
    "a sum that is a list": lambda d: d["state"].update(loss_sum=[1.0]),
    "a count that is missing": lambda d: d["state"].pop("epoch"),
    "a count nobody knows": lambda d: d["state"].update(phase=1),
    "a log": lambda d: d["state"].update(log_history=[]),
    "no state": lambda d: d.update(state=None),
    "no run": lambda d: d.pop("run"),
    "no files": lambda d: d.update(files={}),
    "files that are a list": lambda d: d.update(files=list(d["files"])),
    "an entry that is a text": lambda d: d["files"].update({"optimizer.pt": "there"}),
    "an entry without size": lambda d: d["files"]["optimizer.pt"].pop("size"),
    "a size that is a text": lambda d: d["files"]["optimizer.pt"].update(size="3221"),
    "a size that is half": lambda d: d["files"]["optimizer.pt"].update(size=0.5),
    "a hash that is a number": lambda d: d["files"]["optimizer.pt"].update(sha256=7),
    "a file outside": lambda d: d["files"].update({"../run.json": d["files"]["optimizer.pt"]}),
    "a file of the system": lambda d: d["files"].update(
        {"/etc/passwd": d["files"]["optimizer.pt"]}
    ),
    "a name that is none": lambda d: d["files"].update({"\ud800\0": d["files"]["optimizer.pt"]}),
    "a run without arguments": lambda d: d["run"].pop("arguments"),
    "labels that are numbers": lambda d: d["run"].update(labels=[1, 2]),
    "data that is a text": lambda d: d["run"].update(data_sha256="?"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_refused_by_name(forgery, run):
    forge(run / "checkpoint-4", FORGERIES[forgery])
    with pytest.raises(MiniloraError, match=r"minilora\.json"):
        read_checkpoint(run / "checkpoint-4")
    assert plan_resume(run).stored.path == run / "checkpoint-3"


@pytest.mark.parametrize("change", [{"step_in_epoch": 900}, {"epoch": 7}, {"step_in_epoch": 3}])
def test_a_position_that_is_none_is_refused_rather_than_sought_for_ever(change, run):
    forge(run / "checkpoint-4", lambda document: document["state"].update(change))
    with pytest.raises(MiniloraError, match="where an epoch has 3"):
        saver.run(run)


def test_a_renamed_checkpoint_is_refused(run):
    """HF Trainer would take it for the newest, whatever is in it."""
    (run / "checkpoint-3").rename(run / "checkpoint-30")
    with pytest.raises(MiniloraError, match="holds step 3"):
        plan_resume(run / "checkpoint-30")
    assert plan_resume(run).stored.path == run / "checkpoint-4"
    assert saver.run(run) == 0
    assert not (run / "checkpoint-30").exists()


def test_a_link_to_a_checkpoint_is_set_aside_and_what_it_points_to_left_alone(run, finished):
    (run / "checkpoint-9").symlink_to(finished / "checkpoint-4")
    before = {p: p.read_bytes() for p in (finished / "checkpoint-4").iterdir()}
    assert plan_resume(run).stored.path == run / "checkpoint-4"
    assert saver.run(run) == 0
    assert not (run / "checkpoint-9").exists()
    assert {p: p.read_bytes() for p in (finished / "checkpoint-4").iterdir()} == before


def edited(name: str, finished: Path, change):
    value = torch.load(finished / "checkpoint-4" / name, weights_only=True)
    return change(copy.deepcopy(value)) or value


def replaced(key, value):
    """A change: `value` under `key`, a path through dictionaries, lists and tuples."""

    def change(whole):
        *path, last = key
        inner = whole
        for part in path:
            inner = inner[part]
        if isinstance(inner, tuple):
            raise TypeError
        inner[last] = value
        return whole

    return change


WRONG = {
    "optimizer.pt": {
        "a list": lambda v: [v],
        "no groups": replaced(["param_groups"], None),
        "groups of texts": replaced(["param_groups"], ["a", "b"]),
        "another number of parameters": replaced(["param_groups", 0, "params"], [0]),
        "parameters twice": replaced(["param_groups", 0, "params"], [0, 0]),
        "parameters that are texts": replaced(["param_groups", 0, "params"], ["a", "b"]),
        "a learning rate that is a text": replaced(["param_groups", 0, "lr"], "fast"),
        "a learning rate no float holds": replaced(["param_groups", 0, "lr"], 10**400),
        "one beta": replaced(["param_groups", 0, "betas"], (0.9,)),
        "another algorithm": replaced(["param_groups", 0, "amsgrad"], True),
        "states in a list": replaced(["state"], []),
        "a parameter too many": replaced(["state", 9], {}),
        "a parameter that is a text": replaced(["state", "x"], {}),
        "a state that is a text": replaced(["state", 0], "x"),
        "no moments": replaced(["state", 0], {}),
        "a moment that is a number": replaced(["state", 0, "exp_avg"], 1.0),
        "a moment of another shape": replaced(["state", 0, "exp_avg"], torch.zeros(7)),
        "a moment of integers": replaced(["state", 0, "exp_avg"], torch.zeros(2, 4).int()),
        "steps in a vector": replaced(["state", 0, "step"], torch.zeros(5)),
    },
    "scheduler.pt": {
        "a list": lambda v: [v],
        "nothing in it": lambda v: {"a": 1},
        "no position": lambda v: {k: v[k] for k in v if k != "last_epoch"},
        "a position that is a text": replaced(["last_epoch"], "4"),
        "a position that is a truth": replaced(["last_epoch"], True),
        "one rate for two groups": replaced(["_last_lr"], [0.1]),
        "rates that are texts": replaced(["base_lrs"], ["a", "b"]),
        "lambdas that are texts": replaced(["lr_lambdas"], ["a", "b"]),
    },
    "rng_state.pth": {
        "a list": lambda v: [v],
        "no python": lambda v: {k: v[k] for k in v if k != "python"},
        "a python of another version": replaced(["python"], (2, (1, 2), None)),
        "a python without numbers": replaced(["python"], (3, ("a",) * 625, None)),
        "a python that is a number": replaced(["python"], 3),
        "a numpy too short": replaced(["numpy"], ("MT19937", [1, 2], 0, 0, 0.0)),
        "a numpy beyond its end": replaced(["numpy"], ("MT19937", [1] * 624, 10**6, 0, 0.0)),
        "a numpy before its start": replaced(["numpy"], ("MT19937", [1] * 624, -5, 0, 0.0)),
        "another generator": replaced(["numpy"], ("PCG64", [1] * 624, 0, 0, 0.0)),
        "a torch that is a text": replaced(["cpu"], "x"),
        "a torch too short": replaced(["cpu"], torch.zeros(16, dtype=torch.uint8)),
        "a torch of zeros": replaced(["cpu"], torch.full((5056,), 255, dtype=torch.uint8)),
        "a torch of floats": replaced(["cpu"], torch.zeros(5056)),
        "a cuda that is a text": replaced(["cuda"], "x"),
        "masks of another length": replaced(["mask_stream"], torch.zeros(3, dtype=torch.int64)),
        "masks of floats": replaced(["mask_stream"], torch.zeros(4)),
        "masks that are a text": replaced(["mask_stream"], "x"),
    },
}
CASES = [(name, case) for name, cases in WRONG.items() for case in cases]


def tensors_of(training: Training) -> list[torch.Tensor]:
    states = [t for values in training.optimizer.state.values() for t in values.values()]
    return [t.detach().clone() for t in [*training.model.parameters(), *states]]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_structure_that_is_not_ours_is_refused_before_anything_changes(name, case, run, finished):
    """Its hash is right: this is what a forger, or a Trainer's file without hash, can bring."""
    rewrite(run / "checkpoint-4", name, edited(name, finished, WRONG[name][case]))
    training = saver.build()
    tensors, schedule = tensors_of(training), training.scheduler.state_dict()
    generators = rng_state(nn.Module())
    with pytest.raises(MiniloraError, match=name.replace(".", r"\.")):
        load_checkpoint(run / "checkpoint-4", training)
    after = tensors_of(training)
    assert len(after) == len(tensors) and all(map(torch.equal, after, tensors))
    assert training.scheduler.state_dict() == schedule
    assert rng_state(nn.Module())["python"] == generators["python"]
    assert torch.equal(rng_state(nn.Module())["cpu"], generators["cpu"])


def test_the_structures_that_we_wrote_are_accepted(run, finished):
    """Negative control: rewriting a file as it was is no damage."""
    for name in WRONG:
        rewrite(run / "checkpoint-4", name, edited(name, finished, lambda value: value))
    load_checkpoint(run / "checkpoint-4", saver.build())


@pytest.fixture
def foreign(run) -> Path:
    """A checkpoint as HF Trainer leaves it: no hashes, and a pickle that nobody should open."""
    checkpoint = run / "checkpoint-4"
    (checkpoint / "minilora.json").unlink()
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Payload(run.parent / "ran")))
    return checkpoint


def test_a_foreign_checkpoint_is_read_and_its_arguments_never_opened(foreign):
    load_checkpoint(foreign, saver.build())
    assert not (foreign.parent.parent / "ran").exists()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_structure_that_is_not_trainers_is_refused(name, case, foreign, finished):
    torch.save(edited(name, finished, WRONG[name][case]), foreign / name)
    with pytest.raises(MiniloraError, match=name.replace(".", r"\.")):
        load_checkpoint(foreign, saver.build())


def test_moments_of_too_few_parameters_are_refused(foreign, finished):
    """Trainer would begin the missing ones anew, silently."""

    def without_one(value):
        value["state"].pop(1)
        return value

    torch.save(edited("optimizer.pt", finished, without_one), foreign / "optimizer.pt")
    with pytest.raises(MiniloraError, match="holds no moments of 1 of the 2 parameters"):
        load_checkpoint(foreign, saver.build())


def same_value(one, other) -> None:
    """Assert that two loaded values are the same to the last bit of every tensor."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for inner, another in zip(one, other, strict=True):
            same_value(inner, another)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_a_tensor_in_which_one_number_differs_is_seen(finished):
    """Negative control of the test below."""
    state = torch.load(finished / "checkpoint-4" / "optimizer.pt", weights_only=True)
    changed = copy.deepcopy(state)
    changed["state"][0]["exp_avg"].view(-1)[-1] += 1e-7
    with pytest.raises(AssertionError):
        same_value(state, changed)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_in_a_foreign_archive_is_refused(name, seed, foreign):
    """torch.load would return another number: it does not look at the archive's checksums."""
    before = torch.load(foreign / name, weights_only=True)
    flip(foreign / name, seed)
    try:
        load_checkpoint(foreign, saver.build())
    except MiniloraError as error:
        assert name in str(error)
    else:  # a bit that says nothing: padding between the parts, a date
        same_value(before, torch.load(foreign / name, weights_only=True))


def test_a_foreign_checkpoint_whose_writer_was_stopped_gives_way_to_an_older_one(run):
    """HF Trainer does not sync: after a crash its files may be there and empty."""
    checkpoint = run / "checkpoint-4"
    (checkpoint / "minilora.json").unlink()
    (checkpoint / "training_args.bin").write_bytes(b"")
    with pytest.raises(MiniloraError, match="incomplete"):
        plan_resume(checkpoint)
    plan = plan_resume(run)
    assert plan.stored.path == run / "checkpoint-3"
    assert plan.set_aside == [(checkpoint, "invalid")]


@pytest.mark.parametrize("name", [n for n in FILES if n != "minilora.json"])
def test_a_link_in_a_foreign_checkpoint_is_refused(name, foreign):
    link_outside(foreign / name, 0)
    with pytest.raises(MiniloraError, match=rf"{name} is a symbolic link"):
        load_checkpoint(foreign, saver.build())


@pytest.mark.parametrize(
    "change",
    [
        {"global_step": "4"}, {"global_step": -4}, {"global_step": 10**400}, {"epoch": None},
        {"epoch": 10**400}, {"epoch": float("nan")}, {"log_history": {}}, {"log_history": [1]},
        {"log_history": [{"loss": "x", "step": 1}]}, {"log_history": [{"loss": 1.0, "step": "1"}]},
        {"log_history": [{"loss": 10**400, "step": 1}]}, {"best_metric": "x"}, {"max_steps": []},
        {"best_global_step": "x"}, {"log_history": None},
    ],
)  # fmt: skip
def test_a_foreign_state_of_wrong_types_is_refused(change, foreign):
    file = foreign / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(MiniloraError, match=r"trainer_state\.json"):
        load_checkpoint(foreign, saver.build())
