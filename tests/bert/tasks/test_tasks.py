"""The seam: whatever is a file of the folder is a whole task."""

from pathlib import Path

import pytest

from minilora.bert import tasks
from minilora.bert.tasks import Task, task_class
from tests.conftest import task_of

NAMES = sorted(
    path.stem for path in Path(tasks.__file__).parent.glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_a_task_of_its_name_that_fills_the_seam(name):
    task = task_of(name, ["a", "b"])
    assert task.name == task_class(name).name == name
    seam = [*Task.__annotations__, *(part for part in vars(Task) if part[0] != "_")]
    for part in seam:
        assert hasattr(task, part), part


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_folder_knows_a_tasks_name(name):
    """But the flags: the default of one, and of which tasks others are."""
    folder = Path(tasks.__file__).parent
    for path in (folder.parent.parent).rglob("*.py"):
        if path.parent != folder and path.name != "config.py":
            assert f'"{name}"' not in path.read_text(), path
