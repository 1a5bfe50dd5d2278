"""Numbers that say how good predictions are, in plain numpy, each from its textbook definition.

Where a definition divides by zero (one class never occurs, or predictions are constant), the value
is 0.0: no evidence of skill. This is scikit-learn's convention for F1 and Matthews; for the
correlations, scipy gives NaN, which JSON cannot hold.

A confusion matrix (C, C) counts examples: row the true class, column the predicted one.
"""

import numpy as np


def classification_metrics(confusion: np.ndarray) -> dict[str, float]:
    """accuracy, f1 (macro) and matthews."""
    return {
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "f1": macro_f1(confusion),
        "matthews": matthews_correlation(confusion),
    }


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """mse, pearson and spearman of predictions (N,) and labels (N,)."""
    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    return {
        "mse": float(np.mean((predictions - labels) ** 2)),
        "pearson": pearson_correlation(predictions, labels),
        "spearman": pearson_correlation(ranks(predictions), ranks(labels)),
    }


def macro_f1(confusion: np.ndarray) -> float:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur, as label or prediction."""
    true_positives = np.diag(confusion)
    occurrences = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    occurring = occurrences > 0
    return float(np.mean(2 * true_positives[occurring] / occurrences[occurring]))


def matthews_correlation(confusion: np.ndarray) -> float:
    """Matthews' coefficient for C classes (Gorodkin 2004, R_K): 1 perfect, 0 as chance."""
    confusion = confusion.astype(np.float64)
    actual, predicted, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    covariance = np.trace(confusion) * total - actual @ predicted
    variances = (total**2 - predicted @ predicted) * (total**2 - actual @ actual)
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0


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
