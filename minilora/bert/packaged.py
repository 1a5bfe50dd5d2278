"""The sentences that ship with minilora: short opinions in English, written for this project.

Two files of text, label (positive, negative) and kind, with a header. The kind says what makes a
sentence hard: plain, negation, mixed (praise and blame, one prevailing), comparison, irony.
"""

from pathlib import Path

TRAIN_FILE = Path(__file__).parent / "sentences" / "train.tsv"
VALIDATION_FILE = TRAIN_FILE.with_name("validation.tsv")
