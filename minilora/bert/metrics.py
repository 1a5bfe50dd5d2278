"""Numbers that say how good predictions are, in plain numpy, each from its textbook definition.

Where a definition divides by zero (one class never occurs, or predictions are constant), the value
is 0.0: no evidence of skill. This is scikit-learn's convention for F1 and Matthews; for the
correlations, scipy gives NaN, which JSON cannot hold.

A confusion matrix (C, C) counts examples: row the true class, column the predicted one.
"""

import re
import string
from collections import Counter

import numpy as np

Counts = np.ndarray | list[int]
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def classification_metrics(confusion: np.ndarray) -> dict[str, float]:
    """accuracy, f1 (macro) and matthews."""
    confusion = confusion.astype(np.float64)
    correct, total = np.diag(confusion), confusion.sum()
    actual, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    # The mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur, as label or prediction.
    occurs = actual + predicted > 0
    f1 = np.mean(2 * correct[occurs] / (actual + predicted)[occurs])
    # Matthews' coefficient for C classes (Gorodkin 2004, R_K): 1 perfect, 0 as chance.
    covariance = correct.sum() * total - actual @ predicted
    variances = (total**2 - predicted @ predicted) * (total**2 - actual @ actual)
    return {
        "accuracy": float(correct.sum() / total),
        "f1": float(f1),
        "matthews": float(covariance / np.sqrt(variances)) if variances > 0 else 0.0,
    }


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """mse, pearson and spearman of predictions (N,) and labels (N,)."""
    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    return {
        "mse": float(np.mean((predictions - labels) ** 2)),
        "pearson": pearson_correlation(predictions, labels),
        "spearman": pearson_correlation(ranks(predictions), ranks(labels)),
    }


def pearson_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of two float64 vectors (N,)."""
    x, y = x - x.mean(), y - y.mean()
    norms = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norms) if norms > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 0, ties sharing their mean rank: [3, 1, 3] -> [1.5, 0, 1.5]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[inverse]


def answer_scores(found: str, right: list[str]) -> tuple[float, float]:
    """(exact match, F1) of an answer, each against the right answer that it is closest to; "" is no
    answer. SQuAD's definition (evaluate-v2.0.py), 1.0 for its 100.
    """
    words = answer_words(found)
    # A right answer such as "the" is none.
    truths = [truth for truth in map(answer_words, right) if truth] or [[]]
    overlaps = []
    for truth in truths:
        shared, both = (Counter(words) & Counter(truth)).total(), len(words) + len(truth)
        overlaps.append(2 * shared / both if words and truth else float(words == truth))
    return float(words in truths), max(overlaps)


def answer_words(text: str) -> list[str]:
    """The words of an answer that count: no case, no punctuation of ASCII, no articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(NO_PUNCTUATION)).split()


def entity_spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(name, first, last) of each entity in a sentence's tags, such as B-PER, I-PER, O.

    IOB1, IOB2 and BIOES, mixed or unfinished, as conlleval.pl and so seqeval's default mode (1.2.2)
    read them: an entity is also begun by an I or E of its own, and ended by another name.
    """
    found, begun, before, name_before = set(), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        letter, name = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        is_other = name != name_before
        is_cut = before in "ES" or (before in "BI" and letter in "BSO")
        if is_cut or (before not in "O." and is_other):
            found.add((name_before, begun, place - 1))
        is_start = letter in "BS" or (before in "ESO" and letter in "EI")
        if is_start or (letter not in "O." and is_other):
            begun = place
        before, name_before = letter, name
    return found


def precision_recall_f1(correct: int, predicted: int, actual: int) -> dict[str, float]:
    """From how many were found and are right, were found, and are there."""
    return {
        "precision": correct / predicted if predicted else 0.0,
        "recall": correct / actual if actual else 0.0,
        "f1": 2 * correct / (predicted + actual) if predicted + actual else 0.0,
    }


def scores_by_class(
    names: list[str], correct: Counts, predicted: Counts, actual: Counts
) -> dict[str, dict[str, float]]:
    """precision, recall, f1 and support of each class, from counts (C,)."""
    counts = np.stack([correct, predicted, actual], axis=-1).tolist()
    scores = [precision_recall_f1(*each) | {"support": each[-1]} for each in counts]
    return dict(zip(names, scores, strict=True))


def best_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """From where on a probability should mean yes: the micro F1 over all (N, C) is then the highest
    that any threshold gives; of several, the highest. 0.5 where there is no yes to be found.

    It lies midway between two probabilities, so that a last bit of one changes nothing.
    """
    order = np.argsort(-probabilities, axis=None, kind="stable")
    sorted_down, is_yes = probabilities.reshape(-1)[order], labels.reshape(-1)[order] > 0
    below = np.append(sorted_down[1:], 0.0)
    f1 = 2 * np.cumsum(is_yes) / (np.arange(1, len(order) + 1) + is_yes.sum())
    f1[sorted_down == below] = 0.0  # no threshold parts these two
    best = int(f1.argmax())
    return float((sorted_down[best] + below[best]) / 2) if f1[best] > 0 else 0.5


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64: the float32 logits are all that was rounded."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
