"""The sentences that ship with minilora: short opinions in English, positive or negative, written
for this project.

    train.tsv  validation.tsv        text, label (positive, negative), kind, with a header

The kinds say what makes a sentence hard: plain, negation, mixed (praise and blame, one prevailing),
comparison, irony.
"""

from pathlib import Path

DIRECTORY = Path(__file__).parent / "sentences"
TRAIN_FILE = DIRECTORY / "train.tsv"
VALIDATION_FILE = DIRECTORY / "validation.tsv"
