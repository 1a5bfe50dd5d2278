"""The seam: whatever is a file of the folder is a whole task."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from minilora import TrainConfig
from minilora.bert import tasks
from minilora.bert.dataset import collate_padded, tokenize
from minilora.bert.examples import Examples, by_example
from minilora.bert.packing import collate_packed
from minilora.bert.rows import Row
from minilora.bert.tasks import Task, task_class, varied
from tests.conftest import task_of

NAMES = sorted(
    path.stem for path in Path(tasks.__file__).parent.glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_a_task_of_its_name_that_fills_the_seam(name):
    task = task_of(name, ["a", "b"])
    assert task.name == task_class(name).name == name
    seam = [*Task.__annotations__, *(part for part in vars(Task) if part[0] != "_")]
    for part in seam:
        assert hasattr(task, part), part


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_folder_knows_a_tasks_name(name):
    """But the flags: the default of one, and of which tasks others are."""
    folder = Path(tasks.__file__).parent
    for path in (folder.parent.parent).rglob("*.py"):
        if path.parent != folder and path.name != "config.py":
            assert f'"{name}"' not in path.read_text(), path


LENGTHS = [3, 5, 2]


def tokens_of(labels, logits_of):
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    ids, each = np.arange(10, dtype=np.int32) + 100, np.arange(3)
    return Examples(ids, None, offsets, labels, each, truncated=0, logits_of=logits_of)


@pytest.mark.parametrize("collate", [collate_padded, collate_packed])
def test_what_is_of_tokens_comes_apart_by_example_however_it_was_batched(collate):
    examples = tokens_of(np.arange(10), "tokens")
    batch = collate(examples, np.array([1, 2, 0]), 0, *[8] * (collate is collate_packed))
    expected = [[3, 4, 5, 6, 7], [8, 9], [0, 1, 2]]
    assert [part.tolist() for part in by_example(batch["labels"].numpy(), batch)] == expected
    wide = by_example(np.stack([batch["labels"]] * 2, axis=-1), batch)
    assert [part[:, 1].tolist() for part in wide] == expected
    assert set(batch["labels"].reshape(-1).tolist()) == {-100, *range(10)}


@pytest.mark.parametrize("collate", [collate_padded, collate_packed])
def test_of_masked_tokens_there_are_their_places_and_labels_alone(collate):
    labels = np.array([-100, 1, -100, 3, -100, 5, -100, -100, -100, -100])
    examples = tokens_of(labels, "masked tokens")
    batch = collate(examples, np.array([1, 2, 0]), 0, *[8] * (collate is collate_packed))
    ids = batch["input_ids"].reshape(-1)[batch["masked"]]
    assert (ids - 100).tolist() == batch["labels"].tolist()
    apart = by_example(batch["labels"].numpy(), batch)
    assert [part.tolist() for part in apart] == [[3, 5], [], [1]]


@pytest.mark.parametrize("collate", [collate_padded, collate_packed])
def test_places_of_an_answer_are_labels_of_an_example(collate):
    examples = tokens_of(np.array([[0, 1], [2, 3], [4, 5]]), "tokens")
    batch = collate(examples, np.array([2, 0]), 0, *[1] * (collate is collate_packed))
    assert batch["labels"].tolist() == [[4, 5], [0, 1]]


def test_a_task_may_vary_its_examples_by_epoch_and_what_else_it_made_is_carried(tiny_model):
    class Varying(task_class("sequence_classification")):
        def encode(self, rows, *arguments):
            return super().encode(rows, *arguments) | {"spans": np.arange(len(rows))}

        def vary(self, examples, epoch):
            ids = examples.input_ids + (0 if epoch is None else epoch)
            return dataclasses.replace(examples, input_ids=ids)

    task, tokenizer = Varying(TrainConfig(), ["a", "b"]), AutoTokenizer.from_pretrained(tiny_model)
    rows = [Row("good", None, "a", None, 1), Row("bad", None, "b", None, 2)]
    for _ in range(2):  # tokenised, then from the cache
        examples = tokenize(rows, task, tokenizer, 8, "f")
        assert examples.extra["spans"].tolist() == [0, 1]
    assert (varied(task, examples, 2).input_ids - examples.input_ids == 2).all()
    assert (varied(task, examples, None).input_ids == examples.input_ids).all()
    plain = task_of("sequence_classification", ["a", "b"])
    assert varied(plain, examples, 2) is examples
