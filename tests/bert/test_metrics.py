"""Our metrics against scikit-learn's and scipy's."""

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from minilora.bert.metrics import (
    classification_metrics,
    entity_spans,
    precision_recall_f1,
    ranks,
    regression_metrics,
)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_are_scikit_learns(classes, seed):
    draw = np.random.default_rng(seed)
    predictions, labels = draw.integers(0, classes, (2, 50))
    every = list(range(classes))
    found = classification_metrics(
        sklearn.metrics.confusion_matrix(labels, predictions, labels=every)
    )
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predictions),
        "f1": sklearn.metrics.f1_score(labels, predictions, average="macro"),
        "matthews": sklearn.metrics.matthews_corrcoef(labels, predictions),
    }
    assert found == pytest.approx(expected)


def test_a_constant_prediction_has_no_skill():
    found = classification_metrics(np.array([[5, 0], [5, 0]]))
    assert found == {"accuracy": 0.5, "f1": pytest.approx(1 / 3), "matthews": 0.0}
    assert regression_metrics(np.ones(5), np.arange(5.0))["pearson"] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_regression_metrics_are_scipys(seed):
    draw = np.random.default_rng(seed)
    predictions = draw.normal(size=40).round(1)  # rounded, so that there are ties
    labels = (predictions + draw.normal(size=40)).round(1)
    found = regression_metrics(predictions.astype(np.float32), labels.astype(np.float32))
    pearson, _ = scipy.stats.pearsonr(predictions, labels)
    spearman, _ = scipy.stats.spearmanr(predictions, labels)
    assert found["pearson"] == pytest.approx(pearson, abs=1e-6)
    assert found["spearman"] == pytest.approx(spearman, abs=1e-6)
    assert found["mse"] == pytest.approx(np.mean((predictions - labels) ** 2), rel=1e-5)


def test_ties_share_their_rank():
    assert ranks(np.array([3.0, 1.0, 3.0])).tolist() == [1.5, 0.0, 1.5]


NAMED = [f"{letter}-{name}" for letter in "BIES" for name in ("x", "y")]
TAGS = st.sampled_from(["O", *NAMED, "B", "I", "NOUN", "X-x"])


@given(st.lists(TAGS, max_size=12))
@pytest.mark.filterwarnings("ignore:.*seems not to be NE tag")
def test_entities_are_seqevals_in_its_default_mode(tags):
    """IOB1, IOB2, BIOES, their mixtures, and what is none of them."""
    assert entity_spans(tags) == set(get_entities(tags))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("predicted", [["B-x", "I-x", "O", "B-y"], ["O"] * 4])
def test_precision_recall_and_f1_are_seqevals(predicted):
    actual = ["B-x", "I-x", "B-x", "B-y"]
    found, there = entity_spans(predicted), entity_spans(actual)
    ours = precision_recall_f1(len(found & there), len(found), len(there))
    for name, value in ours.items():
        theirs = getattr(seqeval.metrics, f"{name}_score")([actual], [predicted])
        assert value == pytest.approx(theirs), name
