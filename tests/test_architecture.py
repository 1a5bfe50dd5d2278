"""The house: which room may import which, checked in the code's own imports."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minilora"
ROOMS = sorted(PACKAGE.rglob("*.py"))
# A room imports only from its own folder and from those before it. The files of the root stand on
# the ground (errors, durable, reading) or under the roof (the commands and what they share).
FLOORS = {
    "errors": 0,
    "durable": 1,
    "reading": 1,
    "lora": 2,
    "bert": 3,
    "training": 4,
    "starting_model": 5,
    "model_card": 5,
    "execution": 5,
    "fine_tuning": 6,
    "trained": 7,
    "command": 7,
    "train": 8,
    "evaluate": 8,
    "predict": 8,
    "merge": 8,
    "inspect": 8,
}
COMMANDS = ("train", "evaluate", "predict", "merge", "inspect")
FORBIDDEN_NAMES = ("utils", "util", "common", "helpers", "helper", "misc", "base", "manager")


def imports_of(path: Path) -> list[str]:
    """Dotted names of everything a file imports, at any depth of its code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.append(module)
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def folder_of(dotted: str) -> str:
    return dotted.split(".")[1] if dotted.count(".") else ""


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_before_it(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return  # resolves names lazily
    for name in imports_of(path):
        if name.startswith("minilora.") and folder_of(name) in FLOORS:
            other = folder_of(name)
            assert other == own or FLOORS[other] < FLOORS[own], f"{path} imports {name}"


def test_lora_and_bert_do_not_import_each_other():
    for path in (PACKAGE / "bert").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith("minilora.lora")], path


def test_training_knows_neither_bert_nor_transformers():
    for path in (PACKAGE / "training").rglob("*.py"):
        for name in imports_of(path):
            assert not name.startswith(("minilora.bert", "transformers")), f"{path} imports {name}"


def test_only_bert_knows_transformers():
    names = ("starting_model", "execution", "fine_tuning", "trained/run", "trained/merged_model")
    allowed = {PACKAGE / f"{name}.py" for name in names}
    for path in ROOMS:
        if any(name.split(".")[0] == "transformers" for name in imports_of(path)):
            assert path.parent == PACKAGE / "bert" or path in allowed, path


def test_the_package_imports_nothing_but_its_core_dependencies():
    allowed = {"torch", "transformers", "safetensors", "numpy", "tqdm", "minilora"}
    for path in ROOMS:
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_no_room_has_a_name_that_says_nothing():
    assert not [path for path in ROOMS if path.stem in FORBIDDEN_NAMES]


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {}
    for path in ROOMS:
        module = ".".join(["minilora", *path.relative_to(PACKAGE).with_suffix("").parts])
        graph[module.removesuffix(".__init__")] = set(imports_of(path))
    modules = set(graph)
    graph = {module: names & modules - {"minilora"} for module, names in graph.items()}

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        for other in graph[module]:
            visit(other, [*trail, module])

    for module in modules - {"minilora"}:
        visit(module, [])


@pytest.mark.parametrize(
    "name", ["minilora", "minilora.command", *(f"minilora.{command}" for command in COMMANDS)]
)
def test_a_command_can_be_parsed_without_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_answers_without_torch_and_groups_its_flags():
    code = (
        "import sys, runpy; sys.argv = ['train', '--help']\n"
        "try: runpy.run_module('minilora.train', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for group in ("model:", "data:", "output:", "training:", "evaluation:", "LoRA:"):
        assert group in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_in_under_a_second(command):
    start = time.perf_counter()
    flags = [sys.executable, "-m", f"minilora.{command}", "--help"]
    result = subprocess.run(flags, capture_output=True, text=True)
    assert time.perf_counter() - start < 1 and result.returncode == 0
    assert f"python -m minilora.{command}" in result.stdout


def test_no_public_function_bears_the_name_of_a_module():
    import minilora

    modules = {part for path in ROOMS for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not modules & set(minilora.__all__)


def test_every_public_name_resolves():
    import minilora

    for name in minilora.__all__:
        assert getattr(minilora, name).__name__ == name


def test_the_readme_names_every_room_with_a_phrase():
    """The tree in the README is the map: no file is missing there, none is listed that is gone."""
    readme = (PACKAGE.parent / "README.md").read_text()
    tree = readme.split("    minilora/\n", 1)[1].split("\n\n", 1)[0]
    listed, folder = set(), ""
    for line in tree.splitlines():
        name, _, phrase = line.strip().partition(" ")
        assert phrase.strip(), f"no phrase for {name}"
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            listed.add((folder if line.startswith(" " * 8) else "") + name)
    rooms = {str(path.relative_to(PACKAGE)) for path in ROOMS if path.stem != "__init__"}
    assert listed == rooms
