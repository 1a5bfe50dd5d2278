"""Readers given anything: a value or a `MiniloraError`, and nothing else, however bad the bytes.

Hypothesis makes the bytes up, or damages good ones; `tests/corpus` keeps files bad in a way that is
worth remembering. The name of such a file begins with the reader that it is for.
"""

import contextlib
import dataclasses
import io
import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from minilora import LoraConfig, MiniloraError, add_adapter, load_adapter
from minilora.bert.rows import read_rows
from minilora.lora.config import NOT_SUPPORTED, config_from_dict
from minilora.lora.peft_files import CONFIG_NAME, adapter_files, read_adapter, read_config
from minilora.reading import (
    check_like,
    parse_json,
    parse_safetensors,
    parse_torch,
    read_bytes,
    read_json,
)
from minilora.training.checkpoint import read_checkpoint
from minilora.training.config import TrainConfig, train_config_from_dict
from minilora.training.record import RUN_NAME, RunRecord
from minilora.training.rng import check_rng_state, rng_state
from minilora.training.trainer_files import MAX_STATE_BYTES, NUMPY_GLOBALS, check_progress
from tests.faults.saver import Toy

CORPUS = Path(__file__).parent / "corpus"
# No deadline for one example (the machine may be busy); a reader that hangs is seen all the same.
ONE_FILE = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**310)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["query", "all-linear", "(", "*", "LORA", "SEQ_CLS", "pissa_niter_999999999"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@contextlib.contextmanager
def only_our_own_error():
    """Whatever else comes out fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(MiniloraError):
            yield


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def toy_adapter() -> dict[str, bytes]:
    model = Toy()
    add_adapter(model, LoraConfig(r=2, target_modules=["query"]))
    return adapter_files(model)


GOOD = {
    "torch": torch_bytes({"a": torch.arange(9.0), "b": [1, (2.0, None)], "c": {"d": "text"}}),
    "rng": torch_bytes(rng_state(nn.Module())),
    "safetensors": toy_adapter()["adapter_model.safetensors"],
}


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """A good file with some bytes overwritten, cut out or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(0, 8))
        data[start : start + length] = draw(st.binary(max_size=8))
    return bytes(data)


READERS = {
    "torch": lambda path: parse_torch(read_bytes(path), path, NUMPY_GLOBALS),
    "rng": lambda path: check_rng_state(READERS["torch"](path), path),
    "safetensors": lambda path: parse_safetensors(read_bytes(path), path),
    "json": read_json,
    "config": lambda path: read_config(path.parent),
    "state": lambda path: check_progress(read_json(path, MAX_STATE_BYTES), path),
    "run": lambda path: RunRecord.read(path.parent),
    "manifest": lambda path: read_checkpoint(path.parent),
    "bin": lambda path: read_adapter(path.parent),
    "rows": lambda path: list(read_rows(path)),
}
NAMES = {
    "rng": "rng_state.pth",
    "config": "adapter_config.json",
    "state": "trainer_state.json",
    "run": RUN_NAME,
    "manifest": "minilora.json",
    "bin": "adapter_model.bin",
}


def place(directory: Path, kind: str, data: bytes, suffix: str = "") -> Path:
    path = directory / (NAMES.get(kind) or f"file{suffix}")
    path.write_bytes(data)
    if kind == "bin":  # weights are looked at only beside a config
        (directory / CONFIG_NAME).write_bytes(toy_adapter()[CONFIG_NAME])
    return path


@pytest.mark.parametrize("file", sorted(CORPUS.iterdir()), ids=lambda file: file.name)
def test_every_file_of_the_corpus_is_refused(file, tmp_path):
    """One line that names the file, and no code run: the pickles among them would make `ran`."""
    kind = file.name.split("-")[0]
    path = place(tmp_path, kind, file.read_bytes(), file.suffix)
    with pytest.raises(MiniloraError) as refused:
        READERS[kind](path)
    assert path.name in str(refused.value)
    assert not Path("ran-by-the-corpus").exists()


def test_the_good_files_are_read(tmp_path):
    """Negative control: the readers do not refuse everything."""
    for kind, data in GOOD.items():
        READERS[kind](place(tmp_path, kind, data))


@pytest.mark.parametrize("kind", [k for k in READERS if k != "rows"])
@ONE_FILE
@given(data=st.binary(max_size=300))
def test_any_bytes(kind, data, tmp_path):
    with only_our_own_error():
        READERS[kind](place(tmp_path, kind, data))


@pytest.mark.parametrize("kind", GOOD)
@ONE_FILE
@given(data=st.data())
def test_damaged_archives(kind, data, tmp_path):
    with only_our_own_error():
        READERS[kind](place(tmp_path, kind, data.draw(damaged(GOOD[kind]))))


@ONE_FILE
@given(
    header=st.dictionaries(st.text(max_size=8), JSON, max_size=4),
    length=st.integers(0, 2**64 - 1),
    honest=st.booleans(),
    rest=st.binary(max_size=64),
)
def test_a_safetensors_header_may_say_anything(header, length, honest, rest, tmp_path):
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if honest else length) + text + rest
    with only_our_own_error():
        READERS["safetensors"](place(tmp_path, "safetensors", data))


NUMBERS = st.integers(0, 2**64) | st.sampled_from([0, 1, 2, 8, 32, 2**31, 2**63])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U8", "X"]
        ),
        "shape": st.lists(NUMBERS, max_size=4),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@ONE_FILE
@given(header=st.dictionaries(st.text(max_size=4), ENTRY, max_size=3), size=st.integers(0, 64))
def test_a_safetensors_header_may_lie_about_lengths_and_offsets(header, size, tmp_path):
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(size)
    with only_our_own_error():
        tensors = READERS["safetensors"](place(tmp_path, "safetensors", data))
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= size


FIELDS = [f.name for f in dataclasses.fields(LoraConfig)] + list(NOT_SUPPORTED) + ["unheard_of"]


@settings(ONE_FILE, max_examples=800)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_an_adapter_config_may_hold_anything(changes):
    """The outcome is a config that a model can be given, or our own error."""
    values = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], **changes}
    with only_our_own_error():
        config = config_from_dict(values)
        if config.r <= 16 and max(config.rank_pattern.values(), default=0) <= 16:
            add_adapter(Toy(), config)


@ONE_FILE
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=2))
def test_an_adapter_directory_may_hold_anything(changes, tmp_path):
    files = toy_adapter()
    config = {**json.loads(files["adapter_config.json"]), **changes}
    files["adapter_config.json"] = json.dumps(config).encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with only_our_own_error():
        load_adapter(Toy(), tmp_path)


def test_a_rank_that_no_memory_holds_is_refused(tmp_path):
    """A few bytes of JSON ask for terabytes."""
    files = toy_adapter()
    config = {**json.loads(files["adapter_config.json"]), "r": 10**12}
    files["adapter_config.json"] = json.dumps(config).encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(MiniloraError, match="asks for rank 1000000000000"):
        load_adapter(Toy(), tmp_path)


@ONE_FILE
@given(
    changes=st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(TrainConfig)]), JSON, max_size=3
    )
)
def test_recorded_arguments_may_be_anything(changes):
    with only_our_own_error():
        train_config_from_dict(changes, "run.json")


STATE = {"global_step": 4, "epoch": 1.0, "max_steps": 4, "log_history": [{"step": 1, "loss": 0.5}]}
MANIFEST = {"schema_version": 1, "state": {}, "run": {}, "environment": {}, "files": {}}


@pytest.mark.parametrize("kind", ["state", "manifest", "run"])
@ONE_FILE
@given(data=st.data())
def test_a_json_file_may_hold_anything(kind, data, tmp_path):
    good = {"state": STATE, "manifest": MANIFEST, "run": {"arguments": {}, "lora": {}}}[kind]
    changes = data.draw(
        st.dictionaries(st.sampled_from([*good, "labels", "other"]), JSON, max_size=3)
    )
    with only_our_own_error():
        READERS[kind](place(tmp_path, kind, json.dumps({**good, **changes}).encode()))


TABLE = st.text(alphabet=st.sampled_from('ab\t,"\n\r\\{}[]:1.é\x00\u2028 '), max_size=120)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
@ONE_FILE
@given(
    text=TABLE
    | st.lists(st.dictionaries(st.sampled_from(["text", "label", "x"]), JSON), max_size=3).map(
        json.dumps
    )
)
def test_a_data_file_may_hold_anything(suffix, text, tmp_path):
    with only_our_own_error():
        list(read_rows(place(tmp_path, "rows", text.encode(), suffix)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
@ONE_FILE
@given(data=st.binary(max_size=200))
def test_a_data_file_may_be_any_bytes(suffix, data, tmp_path):
    with only_our_own_error():
        list(read_rows(place(tmp_path, "rows", data, suffix)))


def test_a_large_file_is_refused_unread(tmp_path):
    """A terabyte that takes no room on the disk."""
    for name in ("adapter_config.json", "minilora.json", "trainer_state.json", RUN_NAME):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**12)
    for kind in ("config", "manifest", "state", "run"):
        with pytest.raises(MiniloraError, match="1,000,000,000,000 bytes"):
            READERS[kind](tmp_path / NAMES[kind])


LIVE = {
    "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 3)}},
    "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "amsgrad": False, "foreach": None, "name": "a"}],
    "count": torch.zeros(4, dtype=torch.int64),
    "kinds": {"labels": list[str] | None, "size": int},
}


def found(**changes) -> dict:
    """What a file may hold where `LIVE` is expected, with some of it changed."""
    values = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3).half()}},
        "groups": [{"lr": 1, "betas": (0.5, 1), "amsgrad": True, "foreach": {}, "name": "b"}],
        "count": torch.zeros(4, dtype=torch.uint8),
        "kinds": {"labels": ["a"], "size": 3, "unasked": object},
    }
    return {**values, **changes}


def test_what_has_the_structure_of_what_is_live_is_taken():
    check_like(LIVE, found(), "file")
    check_like(LIVE, found(kinds={"labels": None, "size": 0}), "file")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"state": {}}, "state.0 is missing"),
        ({"state": []}, "state is a list"),
        ({"state": {0: {"step": 1.0, "exp_avg": torch.zeros(2, 3)}}}, "state.0.step is float 1.0"),
        (
            {"count": torch.zeros(5, dtype=torch.int64)},
            "count is a torch.int64 tensor of shape (5,",
        ),
        ({"count": torch.zeros(4)}, "count is a torch.float32 tensor"),
        ({"count": torch.zeros(4, dtype=torch.int64, device="meta")}, "count is"),
        ({"count": torch.zeros(4, dtype=torch.int64).to_sparse()}, "count is"),
        ({"groups": []}, "groups is a list of 0"),
        ({"groups": ({},)}, "groups is a tuple of 1"),
        ({"groups": [{"lr": True}]}, "groups.0.lr is bool True"),
        ({"groups": [{"lr": float("nan")}]}, "groups.0.lr is float nan"),
        ({"groups": [{"lr": 2**63}]}, "groups.0.lr is int"),
        ({"groups": [{"lr": 1, "betas": [1, 2]}]}, "groups.0.betas is a list"),
        ({"groups": [{"lr": 1, "betas": (1, 2), "amsgrad": 0}]}, "groups.0.amsgrad is int 0"),
        ({"kinds": {"labels": "a", "size": 3}}, "kinds.labels is str 'a' instead of list[str]"),
        ({"kinds": {"labels": None, "size": 1.5}}, "kinds.size is float 1.5 instead of int"),
    ],
)
def test_what_has_not_is_refused_by_place_and_name(changes, named):
    with pytest.raises(MiniloraError) as refused:
        check_like(LIVE, found(**changes), "file")
    assert str(refused.value).startswith(f"file: {named}")


@ONE_FILE
@given(value=JSON, part=st.sampled_from(sorted(LIVE)))
def test_anything_may_be_held_against_what_is_live(value, part):
    with only_our_own_error():
        check_like(LIVE, found(**{part: value}), "file")
    with only_our_own_error():
        check_like(LIVE, value, "file")


def test_json_is_not_parsed_beyond_its_limit(tmp_path):
    """Whether it comes from a file or from memory: parsed, it takes some thirty times as much."""
    path = place(tmp_path, "json", b'{"a": 1}')
    assert read_json(path, limit=8) == parse_json(b'{"a": 1}', path, limit=8) == {"a": 1}
    for read in (lambda: read_json(path, 7), lambda: parse_json(b'{"a": 1}', path, 7)):
        with pytest.raises(MiniloraError, match="is 8 bytes; at most 7"):
            read()


WITHIN_ITSELF: list = [torch.zeros(1)]
WITHIN_ITSELF.append(WITHIN_ITSELF)
OVERLAPPING = torch.arange(13.0).as_strided((7, 7), (1, 1))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**12), OVERLAPPING, torch.eye(3).to_sparse(), torch.eye(3).to("meta")],
    ids=["stretched", "overlapping", "sparse", "meta"],
)
def test_a_tensor_that_is_not_what_is_stored_is_refused(tensor, tmp_path):
    for value in ({"a": tensor}, [1, {"b": (tensor,)}]):
        path = place(tmp_path, "torch", torch_bytes(value))
        with pytest.raises(MiniloraError, match="sparse, stretched or no data"):
            READERS["torch"](path)


def test_a_value_within_itself_is_read(tmp_path):
    """Negative control: the search ends, and a part of a larger tensor is no stretched one."""
    READERS["torch"](place(tmp_path, "torch", torch_bytes(WITHIN_ITSELF)))
    READERS["torch"](place(tmp_path, "torch", torch_bytes(torch.eye(4)[1:3].t())))


def test_two_values_of_one_name_are_refused(tmp_path):
    with pytest.raises(MiniloraError, match="not valid JSON: a name occurs twice"):
        read_json(place(tmp_path, "json", b'{"a": {"r": 1, "r": 2}}'))
