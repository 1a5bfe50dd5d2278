"""The model and its text: weights, data, tasks, metrics."""
