"""Several processes that train one model: the numbers of one, whatever their number."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from minilora import starting_model
from minilora.lora.peft_files import WEIGHTS_NAME
from minilora.training import distributed, loop
from minilora.training.progress import TrainingBar
from tests.conftest import read_rows, write_sentences
from tests.ranks import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples" / "data"
TASKS = {
    "sequence_classification": ("sentences.tsv", {"class_weights": "positive=3"}),
    "regression": ("numbers.tsv", {}),
    "multi_label_classification": (EXAMPLES / "topics.jsonl", {}),
    "token_classification": (EXAMPLES / "names_train.conll", {"label_smoothing_factor": 0.1}),
    "question_answering": (EXAMPLES / "questions.json", {"max_length": 60, "doc_stride": 8}),
    "masked_lm": (EXAMPLES / "corpus.txt", {"max_length": 16}),
}
ROWS = 41  # so that the last step of an epoch has fewer examples than there are ranks


@pytest.fixture(scope="module")
def without_dropout(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases") / "model"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    text = write_sentences(directory / "sentences.tsv", ROWS, seed=1).read_text()
    numbers = text.replace("positive", "1.5").replace("negative", "-.5")
    (directory / "numbers.tsv").write_text(numbers)
    write_sentences(directory / "validation.tsv", 19, seed=2)
    return directory


def flags_of(base, train_file, output_dir, **settings):
    settings = {"lora_dropout": 0, "max_steps": 8, "learning_rate": 0.01} | settings
    settings |= {"model_name_or_path": base, "train_file": train_file, "output_dir": output_dir}
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def in_float64(losses: Path):
    """What makes a fork train in float64, and rank 0 write each step's loss."""

    def prepare(rank):
        as_ever = starting_model.choose_forward

        def doubled(*given):
            forward = as_ever(*given)
            forward.model.double()
            return forward

        starting_model.choose_forward = doubled
        advance = TrainingBar.advance

        def written(self, batches, loss, learning_rate):
            before = self.examples
            advance(self, batches, loss, learning_rate)
            if rank == 0:
                with losses.open("a") as file:
                    file.write(f"{self.examples - before} {loss!r}\n")

        TrainingBar.advance = written

    return prepare


def trained(world_size, base, train_file, output_dir, **settings):
    """Examples and losses (steps, 2) of float64 training, and the final tensors."""
    losses = Path(f"{output_dir}.losses")
    flags = flags_of(base, train_file, output_dir, **settings)
    finished = run_ranks(world_size, "train", *flags, prepare=in_float64(losses))
    assert [one.code for one in finished] == [0] * world_size, finished[0].err + finished[-1].err
    assert not any(one.out for one in finished[1:])
    tensors = safetensors.torch.load_file(Path(output_dir, WEIGHTS_NAME))
    return np.loadtxt(losses), tensors


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=tolerance, atol=tolerance), name


def a_sample_of(values, sample):
    """All of them in the slow tier, the sample always."""
    marks = [[] if value == sample else [pytest.mark.slow] for value in values]
    return [pytest.param(*v, marks=m) for v, m in zip(values, marks, strict=True)]


@pytest.mark.parametrize(
    "task", a_sample_of([(task,) for task in TASKS], ("token_classification",))
)
def test_as_many_examples_in_a_step_are_the_same_training_for_1_2_and_4(
    task, without_dropout, data, tmp_path
):
    file, settings = TASKS[task]
    settings = {"task": task, **settings}
    each = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    losses, tensors = trained(1, without_dropout, data / file, tmp_path / "1", **settings, **each)
    assert len(losses) == 8
    for world_size, accumulation in ((2, 1), (4, 1)):
        each = {
            "per_device_train_batch_size": 8 // world_size // accumulation,
            "gradient_accumulation_steps": accumulation,
        }
        place = tmp_path / str(world_size)
        found = trained(world_size, without_dropout, data / file, place, **settings, **each)
        np.testing.assert_allclose(found[0], losses, rtol=1e-10)
        assert_equal(found[1], tensors, 1e-10)


@pytest.mark.slow
def test_a_share_that_is_not_weighted_is_noticed(without_dropout, data, tmp_path, monkeypatch):
    """The control: with the mean of the ranks' means, as torch takes it, the numbers differ."""
    settings = {"task": "sequence_classification", "class_weights": "positive=3"}
    how = (without_dropout, data / "sentences.tsv")
    each = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    losses, _ = trained(1, *how, tmp_path / "1", **settings, **each)
    shares = loop.loss_shares
    monkeypatch.setattr(
        loop, "loss_shares", lambda *a: [1 / distributed.world_size() for _ in shares(*a)]
    )
    found, _ = trained(2, *how, tmp_path / "2", per_device_train_batch_size=4, **settings)
    assert not np.allclose(found[:, 1], losses[:, 1], rtol=1e-6)


def resumed(world_size, from_run, to_run, *flags):
    """A run that goes on, with so many processes, from a copy of another's checkpoint-4."""
    shutil.copytree(from_run / "checkpoint-4", to_run / "checkpoint-4")
    shutil.copy(from_run / "run.json", to_run)
    finished = run_ranks(world_size, "train", "--resume_from_checkpoint", to_run, *flags)
    assert [one.code for one in finished] == [0] * world_size, finished[0].err + finished[-1].err
    return finished[0], safetensors.torch.load_file(to_run / WEIGHTS_NAME)


HOW = [(size, dropout) for size in (2, 4) for dropout in ("fast", "torch")]


@pytest.mark.parametrize(("world_size", "dropout"), a_sample_of(HOW, (2, "fast")))
def test_a_resume_has_the_bits_of_the_whole_run(world_size, dropout, tiny_model, data, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "lora_dropout": 0.2}
    settings |= {"per_device_train_batch_size": 2, "dropout": dropout}
    settings["validation_file"] = data / "validation.tsv"
    whole = tmp_path / "whole"
    flags = flags_of(tiny_model, data / "sentences.tsv", whole, **settings)
    first, *others = run_ranks(world_size, "train", *flags)
    assert first.code == 0 and not any(one.code for one in others), first.err
    names = {path.name for path in (whole / "checkpoint-4").glob("rng_state*")}
    assert names == {f"rng_state_{rank}.pth" for rank in range(world_size)}
    told, tensors = resumed(world_size, whole, tmp_path / "resumed")
    assert "may not be bit-exact" not in told.err
    assert_equal(tensors, safetensors.torch.load_file(whole / WEIGHTS_NAME), 0)
    assert read_rows(tmp_path / "resumed") == read_rows(whole)
    # The control: with another rank's generators it is another run.
    swapped = tmp_path / "swapped"
    assert len({(whole / "checkpoint-4" / name).read_bytes() for name in names}) == world_size
    alone, tensors = resumed(1, whole, swapped)
    assert "world_size was" in alone.err
    final = safetensors.torch.load_file(whole / WEIGHTS_NAME)
    assert not all(torch.equal(tensors[name], final[name]) for name in final)


@pytest.mark.parametrize(("before", "after"), a_sample_of([(2, 1), (1, 2), (2, 4)], (2, 1)))
def test_another_number_of_processes_goes_on_with_the_unseen_examples(
    before, after, without_dropout, data, tmp_path
):
    settings = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 8 // before}
    whole = tmp_path / "whole"
    flags = flags_of(without_dropout, data / "sentences.tsv", whole, **settings)
    assert not any(one.code for one in run_ranks(before, "train", *flags))
    told, tensors = resumed(after, whole, tmp_path / "resumed")
    assert f"world_size was {before} and is {after}" in told.err
    assert_equal(tensors, safetensors.torch.load_file(whole / WEIGHTS_NAME), 1e-5)
    for ours, theirs in zip(read_rows(tmp_path / "resumed"), read_rows(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    last = json.loads((tmp_path / "resumed" / "checkpoint-8" / "minilora.json").read_text())
    assert last["state"]["inexact_from"] == 4


def test_examples_are_shared_whole_and_evenly():
    draw = np.random.default_rng(0)
    for count, world_size in ((16, 2), (17, 4), (3, 4)):
        lengths, of_step = draw.integers(3, 60, count), draw.permutation(100)[:count]
        shares = []
        for rank in range(world_size):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(distributed, "rank", lambda rank=rank: rank)
                patch.setattr(distributed, "world_size", lambda size=world_size: size)
                batches = distributed.own_batches(of_step, lengths, 4)
            assert all(0 < len(batch) <= 4 for batch in batches)
            shares.append(np.concatenate([*batches, np.zeros(0, dtype=int)]))
        assert sorted(np.concatenate(shares)) == sorted(of_step)
        if count >= 16:
            place = {example: index for index, example in enumerate(of_step)}
            tokens = [sum(lengths[place[e]] for e in share) for share in shares]
            assert max(tokens) - min(tokens) <= lengths.max()
