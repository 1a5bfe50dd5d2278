"""Classes: what labels mean, what they cost, how they are scored."""

import dataclasses

import numpy as np
import pytest
import sklearn.metrics
import torch
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoTokenizer

from minilora import MiniloraError, TrainConfig
from minilora.bert.rows import Row
from minilora.bert.tasks import task_class
from minilora.training.loop import loss_shares
from tests.conftest import examples_of, task_of, tiny_classifier

NAME = "sequence_classification"


def rows_of(labels, kinds=None):
    kinds = kinds or [None] * len(labels)
    numbered = enumerate(zip(labels, kinds, strict=True), start=2)
    return [Row("text", None, label, kind, line) for line, (label, kind) in numbered]


@pytest.fixture
def ids(tiny_model):
    """The ids that `labels` get where the classes are `names`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def ids(labels, names):
        arrays = task_of(NAME, names).encode(rows_of(labels), tokenizer, 8, "f")
        return arrays["labels"].tolist()

    return ids


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
def test_ids_follow_the_sorted_names(labels, names, ids):
    assert task_class(NAME).find_labels(rows_of(labels), "f") == names
    assert ids(labels, names) == [names.index(label.removesuffix(".0")) for label in labels]


def test_one_class_is_nothing_to_learn():
    with pytest.raises(MiniloraError, match="a single label, 'a'"):
        task_class(NAME).find_labels(rows_of(["a", "a"]), "f")


@pytest.mark.parametrize("labels", [["0.5", "1.25"], [str(i) for i in range(200)]])
def test_measurements_are_not_classes(labels):
    with pytest.raises(MiniloraError, match="--task regression"):
        task_class(NAME).find_labels(rows_of(labels), "f")


def test_an_unknown_label_is_refused_with_its_line_and_the_known_ones(ids):
    with pytest.raises(MiniloraError, match="f, line 3: label 'c' does not occur .* a, b"):
        ids(["a", "c"], ["a", "b"])


def test_rows_without_labels_can_be_encoded(ids):
    assert len(ids([None, None], ["a", "b"])) == 2


def test_the_loss_is_bitwise_transformers():
    """The same operations as in BertForSequenceClassification.forward."""
    model, task = tiny_classifier(num_labels=3).eval(), task_of(NAME, ["a", "b", "c"])
    labels = torch.tensor([0, 1, 2, 0])
    expected = model(input_ids=torch.arange(1, 17).reshape(4, 4), labels=labels)
    batch = {"labels": labels}
    assert torch.equal(task.loss(expected.logits, batch), expected.loss)
    assert torch.equal(task.training_loss(expected.logits, batch), expected.loss)
    assert task.loss_weight(batch) == 4


def test_label_smoothing_is_trainers_up_to_rounding_and_only_for_training():
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    task, plain = (
        task_of(NAME, ["a", "b", "c"], label_smoothing_factor=factor) for factor in (0.1, 0.0)
    )
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels)
    torch.testing.assert_close(task.training_loss(logits, {"labels": labels}), expected)
    assert torch.equal(
        task.loss(logits, {"labels": labels}), plain.loss(logits, {"labels": labels})
    )


def scored(names, logits, labels, kinds, sizes):
    task = task_of(NAME, names)
    scorer = task.scorer(
        rows_of([names[label] for label in labels], kinds), examples_of(len(labels))
    )
    order = torch.randperm(len(labels))  # a batch says itself which rows it is of
    for rows in order.split(sizes):
        scorer.add(logits[rows], {"labels": torch.tensor(labels)[rows], "example": rows})
    return scorer


@pytest.mark.parametrize("sizes", [50, 7, [1, 20, 29]], ids=str)
def test_scores_of_batches_as_they_come_are_scikit_learns_of_the_whole(sizes):
    draw = np.random.default_rng(3)
    logits = torch.from_numpy(draw.normal(size=(50, 3)).astype(np.float32))
    labels = draw.integers(0, 3, 50).tolist()
    scorer = scored(["a", "b", "c"], logits, labels, ["x", "y"] * 25, sizes)
    predicted, found = logits.argmax(-1).numpy(), scorer.metrics()
    assert found["accuracy"] == sklearn.metrics.accuracy_score(labels, predicted)
    for kind, rows in (("x", slice(0, None, 2)), ("y", slice(1, None, 2))):
        expected = sklearn.metrics.accuracy_score(labels[rows], predicted[rows])
        assert found[f"accuracy_{kind}"] == expected
    assert np.array_equal(scorer.confusion, sklearn.metrics.confusion_matrix(labels, predicted))
    assert list(found) == ["accuracy", "f1", "matthews", "accuracy_x", "accuracy_y"]


def test_rows_of_no_kind_are_in_no_accuracy_by_kind():
    found = scored(["a", "b"], torch.eye(2)[[0, 0, 1, 1]], [0, 1, 1, 1], ["x", "x", "y", None], 4)
    by_kind = {name: value for name, value in found.metrics().items() if "_" in name}
    assert by_kind == {"accuracy_x": 0.5, "accuracy_y": 1.0}


def test_a_prediction_is_the_likeliest_label_and_torchs_softmax():
    logits = torch.randn(6, 3) * 20
    found = task_of(NAME, ["a", "b", "c"]).predictions([], examples_of(6), list(logits.numpy()))
    for row, expected in zip(found, logits.double().softmax(-1), strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-12)
        assert row["label"] == "abc"[expected.argmax()] and row["score"] == expected.max()
        assert list(row) == ["label", "score", "probabilities"]


def test_labels_of_one_number_have_an_order_of_their_own():
    """Not that of a set, which changes with PYTHONHASHSEED."""
    labels = task_class(NAME).find_labels(rows_of(["1", "001", "2", "01", "-0", "0"]), "f")
    assert labels == ["-0", "0", "001", "01", "1", "2"]


def test_a_label_of_more_digits_than_python_reads_is_a_name():
    labels = task_class(NAME).find_labels(rows_of(["9" * 5000, "10", "9"]), "f")
    assert labels == ["10", "9", "9" * 5000]


def test_the_scores_of_each_class_are_scikit_learns():
    draw = np.random.default_rng(4)
    logits = torch.from_numpy(draw.normal(size=(50, 3)).astype(np.float32))
    logits[:, 2] = -9  # never predicted
    labels = draw.integers(0, 3, 50).tolist()
    scorer = scored(["a", "b", "c"], logits, labels, None, 7)
    report = sklearn.metrics.classification_report(
        labels, logits.argmax(-1), target_names=["a", "b", "c"], output_dict=True, zero_division=0.0
    )
    for label, scores in scorer.by_class().items():
        assert list(scores) == ["precision", "recall", "f1", "support"]
        theirs = [report[label][n] for n in ("precision", "recall", "f1-score", "support")]
        assert list(scores.values()) == pytest.approx(theirs, abs=1e-12)


def test_balanced_weights_are_scikit_learns():
    labels = np.array([0] * 7 + [1] * 2 + [2])
    task = task_of(NAME, ["a", "b", "c"], class_weights=["balanced"])
    task.weigh(dataclasses.replace(examples_of(10), labels=labels))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert task.class_weights == pytest.approx(expected.tolist(), rel=1e-15)


def test_weights_by_name_are_torchs_and_only_for_training():
    task = task_of(NAME, ["a", "b=c", "d"], class_weights=["b=c=2.5", "a=.5"])
    task.weigh(examples_of(1))
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 1])
    weight = torch.tensor([0.5, 2.5, 1.0])
    expected = torch.nn.CrossEntropyLoss(weight=weight)(logits, labels)
    assert torch.equal(task.training_loss(logits, {"labels": labels}), expected)
    assert torch.equal(
        task.loss(logits, {"labels": labels}), torch.nn.CrossEntropyLoss()(logits, labels)
    )


def test_accumulated_batches_are_the_weighted_mean_of_the_whole():
    config = TrainConfig(class_weights=["a=3", "b=0.25"])
    task = task_of(NAME, ["a", "b", "c"], class_weights=config.class_weights)
    logits, labels = torch.randn(20, 3), torch.randint(0, 3, (20,))
    batches = [{"labels": part} for part in labels.split([7, 12, 1])]
    parts = zip(logits.split([7, 12, 1]), batches, loss_shares(task, config, batches), strict=True)
    total = sum(task.training_loss(part, batch) * share for part, batch, share in parts)
    torch.testing.assert_close(total, task.training_loss(logits, {"labels": labels}))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["c=2"], "there is no class 'c'; there are a, b"),
        (["a"], "'a' is not name=weight, nor balanced alone"),
        (["balanced", "a=1"], "'balanced' is not name=weight, nor balanced alone"),
        (["a=1", "a=2"], "a=2: give a class once, with a number above 0"),
        (["a=0"], "a=0: give a class once"),
        (["a=nan"], "a=nan: give a class once"),
        (["a=much"], "a=much: give a class once"),
    ],
)
def test_weights_of_no_class_and_of_no_number_are_refused(weights, message):
    with pytest.raises(MiniloraError, match=f"class_weights: {message}"):
        task_of(NAME, ["a", "b"], class_weights=weights)


@pytest.mark.parametrize("other", [{"hf_parity": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_weights_are_refused_beside_what_has_none(other):
    with pytest.raises(MiniloraError, match="class_weights"):
        TrainConfig(class_weights=["balanced"], **other)
