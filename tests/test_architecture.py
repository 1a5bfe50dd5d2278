"""The house: which room may import which, checked in the code's own imports."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minilora"
ROOMS = sorted(PACKAGE.rglob("*.py"))
# A room imports only from its own floor's folder and from floors below it.
FLOORS = [
    ["errors"],
    ["options"],
    ["files", "reading"],
    ["lora", "bert"],
    ["training"],
    ["starting_model", "model_card"],
    ["trained"],
    ["fine_tuning"],
    ["sweeping"],
    ["config_file"],
    ["command"],
    ["train", "evaluate", "predict", "merge", "inspect", "report", "env"],
    ["sweep"],
    ["__main__"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
COMMANDS = [*FLOORS[-3], *FLOORS[-2]]
FORBIDDEN_NAMES = ("utils", "util", "common", "helpers", "helper", "misc", "base", "manager")

# Budgets: lines of minilora/, and of the core that README names.
LINES, CORE_LINES = 11_421, 2_292
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 300, 50, 6


def imports_of_node(node: ast.AST) -> list[str]:
    """Dotted names of what one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def imports_of(path: Path) -> list[str]:
    """Dotted names of everything a file imports, at any depth of its code."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [name for node in nodes for name in imports_of_node(node)]


def folder_of(dotted: str) -> str:
    return dotted.split(".")[1] if dotted.count(".") else ""


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_before_it(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return  # resolves names lazily
    for name in imports_of(path):
        if name.startswith("minilora.") and folder_of(name) in FLOOR_OF:
            other = folder_of(name)
            assert other == own or FLOOR_OF[other] < FLOOR_OF[own], f"{path} imports {name}"


def test_every_room_has_a_floor():
    tops = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in ROOMS}
    assert tops - {"__init__"} == set(FLOOR_OF)


def test_training_does_not_know_transformers():
    for path in [*(PACKAGE / "training").rglob("*.py"), *(PACKAGE / "lora").rglob("*.py")]:
        assert not [name for name in imports_of(path) if name.split(".")[0] == "transformers"], path


def test_the_package_imports_nothing_but_its_core_dependencies():
    allowed = {"torch", "transformers", "safetensors", "numpy", "tqdm", "minilora"}
    # Come with transformers, or with an extra; imported where they are used.
    allowed_late = {"huggingface_hub", "tokenizers", "yaml", "datasets", "pyarrow"}
    for path in ROOMS:
        at_the_top = {
            name for node in ast.parse(path.read_text()).body for name in imports_of_node(node)
        }
        for name in imports_of(path):
            top = name.split(".")[0]
            late = name not in at_the_top and top in allowed_late
            known = top in allowed or top in sys.stdlib_module_names
            assert known or late, f"{path} imports {name}"


def core() -> list[Path]:
    """The files that README names as the afternoon's reading, in its order."""
    readme = (PACKAGE.parent / "README.md").read_text()
    section = readme.split("## The core", 1)[1].split("\n## ", 1)[0]
    return [PACKAGE / name for name in re.findall(r"^\d+\. `([\w/]+\.py)`", section, re.M)]


def test_the_package_and_its_core_are_within_their_budgets():
    lines = {path: len(path.read_text().splitlines()) for path in ROOMS}
    assert sum(lines.values()) <= LINES
    assert len(core()) >= 10 and sum(lines[path] for path in core()) <= CORE_LINES


def functions_of(path: Path) -> list[ast.FunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_and_its_functions_fit_on_their_screens(path):
    assert len(path.read_text().splitlines()) <= LINES_OF_A_FILE
    for node in functions_of(path):
        assert (node.end_lineno or 0) - node.lineno < LINES_OF_A_FUNCTION, node.name
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(named) <= PARAMETERS, node.name


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
    """Of the processor's time: on a machine that is busy otherwise, too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = [sys.executable, "-m", f"minilora.{command}", "--help"]
    result = subprocess.run(flags, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert result.returncode == 0
    assert f"python -m minilora.{command}" in result.stdout


def test_no_public_function_bears_the_name_of_a_module():
    import minilora

    modules = {part for path in ROOMS for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not modules & set(minilora.__all__)


def test_every_loading_of_a_model_forbids_its_code():
    """In one place each, which says so: a foreign base model must not run anything."""
    for path in ROOMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                forbids = keywords.get("trust_remote_code")
                assert isinstance(forbids, ast.Constant) and forbids.value is False, path


def test_every_public_name_resolves():
    import minilora

    assert {"LoraConfig", "TrainConfig", "fine_tune", "load_adapter"} <= set(minilora.__all__)
    for name in minilora.__all__:
        assert getattr(minilora, name).__name__ == name


def test_the_page_of_the_house_names_every_room_with_a_phrase():
    """The tree there is the map: no file is missing, none is listed that is gone."""
    page = (PACKAGE.parent / "docs" / "house.md").read_text()
    tree = page.split("    minilora/\n", 1)[1].split("\n\n", 1)[0]
    listed, folders = set(), [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        name, _, phrase = line.strip().partition(" ")
        assert phrase.strip(), f"no phrase for {name}"
        if name.endswith("/"):
            folders[depth:] = [folders[depth - 1] + name if depth > 1 else name]
        elif name.endswith(".py"):
            listed.add((folders[depth - 1] if depth > 1 else "") + name)
    rooms = {str(path.relative_to(PACKAGE)) for path in ROOMS if path.stem != "__init__"}
    assert listed == rooms
