"""Labels and losses."""

import numpy as np
import pytest
import torch

from minilora import MiniloraError
from minilora.bert.tables import Row
from minilora.bert.tasks import accuracy_by_kind, batch_loss, class_ids, label_names, real_values
from tests.conftest import tiny_classifier


def rows_of(labels):
    return [Row("text", None, label, None, line) for line, label in enumerate(labels, start=2)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["1.0", "0.0"], ["0", "1"]),
        (["1", "a"], ["1", "a"]),
        (["False", "True"], ["False", "True"]),
    ],
)
def test_ids_follow_the_sorted_names(labels, names):
    rows = rows_of(labels)
    assert label_names(rows, "f") == names
    expected = [names.index(label.removesuffix(".0")) for label in labels]
    assert class_ids(rows, names, "f").tolist() == expected


def test_one_class_is_nothing_to_learn():
    with pytest.raises(MiniloraError, match="a single label, 'a'"):
        label_names(rows_of(["a", "a"]), "f")


@pytest.mark.parametrize("labels", [["0.5", "1.25"], [str(i) for i in range(200)]])
def test_measurements_are_not_classes(labels):
    with pytest.raises(MiniloraError, match="--task regression"):
        label_names(rows_of(labels), "f")


def test_an_unknown_label_is_refused_with_its_line_and_the_known_ones():
    with pytest.raises(MiniloraError, match="f, line 3: label 'c' does not occur .* a, b"):
        class_ids(rows_of(["a", "c"]), ["a", "b"], "f")


@pytest.mark.parametrize("bad", ["high", "inf", ""])
def test_a_value_must_be_a_finite_number(bad):
    with pytest.raises(MiniloraError, match="f, line 3: label .* is not a finite number"):
        real_values(rows_of(["1.5", bad]), "f")
    assert real_values(rows_of(["1.5", "-2"]), "f").tolist() == [1.5, -2.0]


@pytest.mark.parametrize("task", ["sequence_classification", "regression"])
def test_the_loss_is_bitwise_transformers(task):
    """The same operations as in BertForSequenceClassification.forward."""
    classes = 1 if task == "regression" else 3
    model = tiny_classifier(num_labels=classes).eval()
    ids = torch.arange(1, 17).reshape(4, 4)
    labels = torch.tensor([0.5, 1.0, -1.0, 2.0]) if classes == 1 else torch.tensor([0, 1, 2, 0])
    expected = model(input_ids=ids, labels=labels)
    assert torch.equal(batch_loss(task, expected.logits, labels), expected.loss)


def test_label_smoothing_is_trainers_up_to_rounding():
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    found = batch_loss("sequence_classification", logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


def test_accuracy_is_split_by_kind():
    logits, labels = np.eye(2)[[0, 0, 1, 1]], np.array([0, 1, 1, 1])
    found = accuracy_by_kind(logits, labels, ["x", "x", "y", None])
    assert found == {"accuracy_x": 0.5, "accuracy_y": 1.0}
