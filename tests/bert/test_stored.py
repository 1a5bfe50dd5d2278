"""Weights read from the disk, in whichever files they lie."""

import os

import pytest
import torch
from transformers import BertModel

from minilora import MiniloraError
from minilora.bert.stored import stored_tensors
from tests.bert.test_load import formats


def test_every_layout_holds_the_models_tensors(tmp_path):
    for name, directory in formats(tmp_path).items():
        expected = BertModel.from_pretrained(directory).state_dict()
        found = dict(stored_tensors(str(directory)))
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize(
    ("layout", "file", "data"),
    [
        ("one", "model.safetensors", b"\xff" * 20),
        ("pickled", "pytorch_model.bin", b"PK nonsense"),
        ("sharded", "model.safetensors.index.json", b"{}"),
        ("sharded", "model.safetensors.index.json", b"[" * 100_000),
        ("pickled shards", "part-2.bin", None),
    ],
    ids=str,
)
def test_damaged_weights_are_our_own_error(layout, file, data, tmp_path):
    directory = formats(tmp_path)[layout]
    (directory / file).unlink()
    if data is not None:
        (directory / file).write_bytes(data)
    with pytest.raises(MiniloraError, match="damaged|cannot be read safely"):
        list(stored_tensors(str(directory)))


def test_pickled_weights_run_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    directory = formats(tmp_path)["pickled"]
    torch.save({"weight": Payload()}, directory / "pytorch_model.bin")
    with pytest.raises(MiniloraError, match="cannot be read safely"):
        list(stored_tensors(str(directory)))
    assert not (tmp_path / "ran").exists()
