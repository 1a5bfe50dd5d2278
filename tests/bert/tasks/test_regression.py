"""Numbers: what they cost, how they are scored."""

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoTokenizer

from minilora import MiniloraError
from minilora.bert.rows import Row
from tests.conftest import examples_of, task_of, tiny_classifier

TASK = task_of("regression")


@pytest.fixture
def values(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def values(*labels):
        rows = [Row("text", None, label, None, line) for line, label in enumerate(labels, start=2)]
        return TASK.encode(rows, tokenizer, 8, "f")["labels"]

    return values


@pytest.mark.parametrize("bad", ["high", "inf", ""])
def test_a_value_must_be_a_finite_number(bad, values):
    with pytest.raises(MiniloraError, match="f, line 3: label .* is not a finite number"):
        values("1.5", bad)


def test_values_are_float32_and_may_be_missing_where_they_are_to_be_predicted(values):
    assert values("1.5", "-2").tolist() == [1.5, -2.0] and values("1").dtype == np.float32
    assert len(values(None, None)) == 2


def test_the_loss_is_bitwise_transformers():
    """The same operations as in BertForSequenceClassification.forward."""
    model, labels = tiny_classifier(num_labels=1).eval(), torch.tensor([0.5, 1.0, -1.0, 2.0])
    expected = model(input_ids=torch.arange(1, 17).reshape(4, 4), labels=labels)
    for loss in (TASK.loss, TASK.training_loss):
        assert torch.equal(loss(expected.logits, {"labels": labels}), expected.loss)
    assert TASK.loss_weight({"labels": labels}) == 4


def test_scores_of_batches_as_they_come_are_scipys_of_the_whole():
    logits = torch.randn(20, 1)
    labels = logits[:, 0] + torch.randn(20)
    scorer = TASK.scorer([], examples_of(20))
    for rows in torch.arange(20).split(7):
        scorer.add(logits[rows], {"labels": labels[rows], "example": rows})
    found, values = scorer.metrics(), logits[:, 0].numpy()
    assert found["mse"] == pytest.approx(((values - labels.numpy()) ** 2).mean())
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(values, labels)[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(values, labels)[0], abs=1e-6)


def test_a_prediction_is_the_value():
    assert TASK.predictions([], examples_of(2), [np.array([0.5]), np.array([2.0])]) == [
        {"score": 0.5},
        {"score": 2.0},
    ]
