"""Where the tests look for the exercises: in this folder, or in the one that --answers names.

python -m pytest examples/exercises/test_layer.py
python -m pytest examples/exercises --answers examples/exercises/solutions
"""

import os
import sys
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: some tests fork this process


def pytest_addoption(parser):
    parser.addoption(
        "--answers",
        type=Path,
        default=Path(__file__).parent,
        help="the folder of the exercises that are tested, such as examples/exercises/solutions",
    )


def pytest_configure(config):
    answers = types.ModuleType("answers")
    answers.__path__ = [str(config.getoption("answers").resolve())]
    sys.modules["answers"] = answers
