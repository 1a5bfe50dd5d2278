"""The exercises of docs/12_exercises.md: our solutions pass their tests, nothing does without an
answer, and each planted mistake is met by a test which says what it is.
"""

import functools
import gc
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import peft  # noqa: F401  once, and not in every fork
import pytest
import torch
from transformers import BertForSequenceClassification  # noqa: F401

from tests.forked import run_forked

ROOT = Path(__file__).parent.parent
EXERCISES = ROOT / "examples" / "exercises"
SOLUTIONS = EXERCISES / "solutions"
NAMES = ["layer", "file", "loop", "resume", "commit", "packing"]

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports much at its first call


class Outcomes:
    def __init__(self) -> None:
        self.said: dict[str, str] = {}  # by test name; empty if it passed

    def pytest_runtest_logreport(self, report):
        if report.failed or report.when == "call":
            name = report.nodeid.rpartition("::")[2]
            self.said[name] = report.longreprtext if report.failed else ""

    def pytest_collectreport(self, report):
        if report.failed:
            self.said[report.nodeid] = report.longreprtext


def outcomes_of(tests: str, basetemp: Path, answers: Path | None = None) -> dict[str, str]:
    """What `python -m pytest <tests>`, words separated by spaces, comes to in the repository."""

    def work() -> int:
        # Without what makes a small session slow: others' plugins, and a collector that walks
        # through all that this process has imported.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        gc.freeze()
        outcomes = Outcomes()
        flags = ["-p", "no:cacheprovider", "--assert=plain", "--tb=short"]
        flags += [f"--basetemp={basetemp}"]
        flags += [] if answers is None else [f"--answers={answers}"]
        code = pytest.main([*tests.split(), *flags], plugins=[outcomes])
        print("\n" + json.dumps(outcomes.said))
        return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else 1

    ended = run_forked(work, seconds=120)
    assert ended.code == 0, ended.out + ended.err
    return json.loads(ended.out.splitlines()[-1])


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_our_solutions_pass(tmp_path):
    outcomes = outcomes_of("examples/exercises", tmp_path / "base", SOLUTIONS)
    assert len(outcomes) > 50 and set(outcomes.values()) == {""}, outcomes


def test_nothing_passes_without_an_answer(tmp_path):
    outcomes = outcomes_of("examples/exercises", tmp_path / "base")
    assert len(outcomes) > 50
    for name, said in outcomes.items():
        assert "NotImplementedError" in said, f"{name}: {said or 'passed'}"


def test_the_page_says_how_to_run_them():
    page = (ROOT / "docs" / "12_exercises.md").read_text()
    commands = re.findall(r"`python -m pytest ([^`]+)`", page)
    files = [f"examples/exercises/test_{name}.py" for name in NAMES]
    assert [command for command in dict.fromkeys(commands) if command in files] == files
    assert "examples/exercises --answers examples/exercises/solutions" in commands
    for path in re.findall(r"examples/exercises[\w/.]*", " ".join(commands)):
        assert (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_and_its_tests_are_short(name):
    (exercise,) = EXERCISES.glob(f"ex?_{name}.py")
    assert len(exercise.read_text().splitlines()) < 100
    assert len((EXERCISES / f"test_{name}.py").read_text().splitlines()) < 150
    assert f"python -m pytest examples/exercises/test_{name}.py" in exercise.read_text()


def signatures(path: Path) -> list[str]:
    return re.findall(r"^ *(?:def|class) \w+.*?:$", path.read_text(), re.M | re.S)


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_keeps_to_the_signatures(name):
    (exercise,) = EXERCISES.glob(f"ex?_{name}.py")
    solved = signatures(SOLUTIONS / exercise.name)
    # The parts that `save` and `restore` take are the reader's to choose.
    free = ("def save(", "def restore(")
    assert [s for s in signatures(exercise) if s not in solved and not s.startswith(free)] == []


# Other ways to be right, each of them one replacement in a solution, and the tests that see it.
AS_GOOD = [
    (
        "ex1_layer",
        "",
        "self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling",
        "self.lora_B(self.lora_A(self.lora_dropout(x)) * self.scaling)",
    ),
    (
        "ex4_resume",
        "::test_killed_while_it_saves_it_goes_on_from_the_save_before",
        """    with open(temporary, "wb") as file:
        torch.save(whole, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
""",
        "    torch.save(whole, temporary)\n    temporary.replace(path)\n",
    ),
    ("ex5_commit", "", "os.rename(temporary, path)", "temporary.replace(path)"),
    (
        "ex6_packing",
        "",
        "return segments[:, None] == segments[None, :]",
        "return (segments[:, None] - segments[None, :]) == 0",
    ),
]


def test_other_right_answers_pass(tmp_path):
    tests = []
    for exercise, which, ours, theirs in AS_GOOD:
        solution = (SOLUTIONS / f"{exercise}.py").read_text()
        assert ours in solution
        (tmp_path / f"{exercise}.py").write_text(solution.replace(ours, theirs))
        tests.append(f"examples/exercises/test_{exercise.partition('_')[2]}.py{which}")
    outcomes = outcomes_of(" ".join(tests), tmp_path / "base", tmp_path)
    assert len(outcomes) > 20 and set(outcomes.values()) == {""}, outcomes


@dataclass(frozen=True)
class Mistake:
    exercise: str
    right: str  # in the solution
    wrong: str
    test: str  # which meets it
    says: str

    def __str__(self) -> str:
        return f"{self.exercise}: {self.wrong.strip() or 'without ' + self.right.strip()}"[:60]


MISTAKES = [
    # The layer
    Mistake(
        "ex1_layer", "nn.init.zeros_", "nn.init.normal_",
        "test_it_starts_as_its_base_layer", "B must start at zero",
    ),
    Mistake(
        "ex1_layer", "nn.init.zeros_(",
        "nn.init.zeros_(self.lora_A.weight)\n        nn.init.zeros_(",
        "test_A_is_drawn_as_a_linear_layer_draws_its_weight", "A is zero like B",
    ),
    Mistake(
        "ex1_layer", "lora_alpha / r", "1.0",
        "test_the_output_is_PEFTs", "scaling is lora_alpha / r",
    ),
    Mistake(
        "ex1_layer", "base_layer.requires_grad_(False)", "base_layer",
        "test_only_A_and_B_learn", "The base layer is frozen, its bias included",
    ),
    Mistake(
        "ex1_layer", "y = self.base_layer(x)", "y = self.base_layer(x := self.lora_dropout(x))",
        "test_dropout_is_of_what_A_sees_and_nothing_else", "W sees x whole",
    ),
    Mistake(
        "ex1_layer", "if self.unmerged is not None:\n            return y", "",
        "test_merging_folds_the_update_into_W_and_changes_no_output", "the update counts twice",
    ),
    Mistake(
        "ex1_layer", "weight.copy_(self.unmerged)", "weight.sub_(self.delta_weight())",
        "test_unmerging_gives_back_every_bit_of_W", "keep a copy of W",
    ),
    # The file
    Mistake(
        "ex2_file", '{PREFIX + name: p', '{name: p',
        "test_the_file_holds_what_was_trained_and_nothing_else", "keys that PEFT does not know",
    ),
    Mistake(
        "ex2_file", " if p.requires_grad}", "}",
        "test_the_file_holds_what_was_trained_and_nothing_else", "the frozen base's",
    ),
    Mistake(
        "ex2_file", ' if p.requires_grad}', ' if "lora_" in name}',
        "test_the_file_holds_what_was_trained_and_nothing_else", "The head is trained too",
    ),
    Mistake(
        "ex2_file", '{**config, "peft_type"', '{"r": config["r"], "task_type": "SEQ_CLS", '
        '"target_modules": ["query", "value"], "peft_type"',
        "test_PEFT_reads_what_you_write", "lora_alpha or r is not in the file",
    ),
    Mistake(
        "ex2_file", "{**DEFAULTS, **config}", '{"lora_alpha": config["r"], **config}',
        "test_what_the_config_does_not_say_is_PEFTs_default", "it means the default of LoraConfig",
    ),
    Mistake(
        "ex2_file", "if config.get(name):", "if False:",
        "test_what_would_change_the_numbers_is_refused_by_name[use_rslora]", "DID NOT RAISE",
    ),
    Mistake(
        "ex2_file", "sorted(own.keys() ^ stored.keys())", "sorted(own.keys() - stored.keys())",
        "test_a_file_that_does_not_fit_is_refused_and_changes_nothing[unexpected]",
        "half a model is loaded",
    ),
    Mistake(
        "ex2_file", "if tensor.shape != stored[key].shape:", "if False:",
        "test_a_file_that_does_not_fit_is_refused_and_changes_nothing[reshaped]",
        "half a model is loaded",
    ),
    Mistake(
        "ex2_file", "        if tensor.shape != stored[key].shape:",
        "        if tensor.shape == stored[key].shape:\n            tensor.copy_(stored[key])\n"
        "        else:",
        "test_a_file_that_does_not_fit_is_refused_and_changes_nothing[reshaped]",
        "check, then copy",
    ),
    # The loop
    Mistake(
        "ex3_loop", "return step / warmup", "return (step + 1) / warmup",
        "test_the_schedule_is_transformers", "The first step is taken at 0",
    ),
    Mistake(
        "ex3_loop", "order = torch.randperm(len(examples[\"labels\"]), generator=generator)",
        "order = torch.randperm(len(examples[\"labels\"]))",
        "test_an_epoch_is_an_order_of_all_examples_that_only_seed_and_epoch_decide",
        "global generator",
    ),
    Mistake(
        "ex3_loop", 'len(batch["labels"]) / count', "1 / len(batches)",
        "test_accumulated_batches_are_one_large_batch", "nor 1 / 2 each",
    ),
    Mistake(
        "ex3_loop", 'loss = model(**batch).loss * (len(batch["labels"]) / count)',
        "loss = model(**batch).loss",
        "test_accumulated_batches_are_one_large_batch", "neither their sum",
    ),
    Mistake(
        "ex3_loop", "        loss.backward()\n", "        loss.backward()\n        "
        "nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)\n",
        "test_the_step_is_clipped_once_and_tells_the_norm_before", "the norm before clipping",
    ),
    Mistake(
        "ex3_loop", "    optimizer.zero_grad()\n", "",
        "test_a_step_leaves_no_gradient_to_the_next", "zero_grad() belongs to each step",
    ),
    Mistake(
        "ex3_loop", "    model.train()\n", "",
        "test_the_run_is_minilora_s", "Is the model in training mode",
    ),
    Mistake(
        "ex3_loop", "sum(losses) / len(losses), []", "losses[-1], []",
        "test_the_run_is_minilora_s", "the mean since the last row",
    ),
    # Exact resume
    Mistake(
        "ex4_resume", "    generator = torch.Generator().manual_seed(SEED + epoch)\n    return "
        "torch.randperm(EXAMPLES, generator=generator)", "    return torch.randperm(EXAMPLES)",
        "test_the_order_of_an_epoch_is_a_function_of_the_epoch", "it depends on the past",
    ),
    Mistake(
        "ex4_resume", "    np.random.seed(SEED)\n", "",
        "test_the_run_that_is_left_alone", "two runs that nobody kills differ",
    ),
    Mistake(
        "ex4_resume", "    torch.manual_seed(SEED)\n    model = Model()\n",
        "    model = Model()\n    torch.manual_seed(SEED)\n",
        "test_the_run_that_is_left_alone", "seed first",
    ),
    Mistake(
        "ex4_resume", "        tell(row)\n        if progress.step % SAVE_STEPS == 0 or "
        "progress.step == TOTAL_STEPS:\n            save(path, progress, **parts)\n",
        "        if progress.step % SAVE_STEPS == 0:\n            save(path, progress, **parts)\n"
        "        tell(row)\n",
        "test_killed_at_a_step_it_ends_in_the_same_bits[2]", "took the steps [3, 4",
    ),
    Mistake(
        "ex4_resume", "        progress = restore(path, **parts)\n",
        "        progress = restore(path, **parts)\n        optimizer.state.clear()\n",
        "test_killed_at_a_step_it_ends_in_the_same_bits[9]", "end in other bits",
    ),
    Mistake(
        "ex4_resume", "    return model\n",
        "    torch.rand(os.getpid() % 9999)\n    return model\n",
        "test_killed_at_a_step_it_ends_in_the_same_bits[1]", "a generator is elsewhere",
    ),
    Mistake(
        "ex4_resume", "if path.exists():", "if False:",
        "test_killed_at_a_step_it_ends_in_the_same_bits[4]", "the last checkpoint is of step 2",
    ),
    Mistake(
        "ex4_resume", "        progress = restore(path, **parts)\n",
        "        progress = restore(path, **parts)\n        optimizer.state.clear()\n",
        "test_killed_at_a_step_it_ends_in_the_same_bits[4]", "the optimizer's moments were not",
    ),
    Mistake(
        "ex4_resume", '"optimizer": optimizer, "scheduler": scheduler}', '"optimizer": optimizer}',
        "test_killed_at_a_step_it_ends_in_the_same_bits[4]", "the scheduler's state was not",
    ),
    Mistake(
        "ex4_resume", "        progress = restore(path, **parts)\n",
        "        progress = restore(path, **parts)\n        state = scheduler.state_dict()\n"
        "        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)\n"
        "        scheduler.load_state_dict(state)\n",
        "test_killed_at_a_step_it_ends_in_the_same_bits[4]", "before LambdaLR was built",
    ),
    Mistake(
        "ex4_resume", '    np.random.set_state(stored["generators"]["numpy"])\n', "",
        "test_killed_at_a_step_it_ends_in_the_same_bits[4]", "a generator is not where it was",
    ),
    Mistake(
        "ex4_resume", '    random.setstate(stored["generators"]["python"])\n', "",
        "test_killed_at_a_step_it_ends_in_the_same_bits[9]", "a generator is not where it was",
    ),
    Mistake(
        "ex4_resume", "        progress = restore(path, **parts)\n",
        "        progress = restore(path, **parts)\n        Model()\n",
        "test_killed_at_a_step_it_ends_in_the_same_bits[3]", "Restored too early?",
    ),
    Mistake(
        "ex4_resume", "divmod(progress.step, STEPS_PER_EPOCH)",
        "divmod(progress.step, STEPS_PER_EPOCH)\n        begun = locals().get('begun', place)\n"
        "        place = (place - begun) % STEPS_PER_EPOCH",
        "test_killed_at_a_step_it_ends_in_the_same_bits[4]", "the position in the epoch",
    ),
    Mistake(
        "ex4_resume", 'Progress(**stored["progress"])', 'Progress(stored["progress"]["step"])',
        "test_killed_at_a_step_it_ends_in_the_same_bits[4]", "the sum of the losses since",
    ),
    Mistake(
        "ex4_resume", 'temporary = path.with_name(f".{path.name}.tmp")', "temporary = path",
        "test_killed_while_it_saves_it_goes_on_from_the_save_before[2]",
        "half a checkpoint bears the name of a whole one",
    ),
    Mistake(
        "ex4_resume", " or progress.step == TOTAL_STEPS", "",
        "test_a_run_that_has_ended_takes_no_step", "save after the last",
    ),
    # The commit
    Mistake(
        "ex5_commit", "                os.fsync(file.fileno())\n", "",
        "test_the_data_are_on_the_disk_before_the_name", "was not fsynced before",
    ),
    Mistake(
        "ex5_commit", "                file.flush()\n", "",
        "test_the_data_are_on_the_disk_before_the_name", "flush() before",
    ),
    Mistake(
        "ex5_commit", "        sync(temporary)\n        os.rename(temporary, path)\n",
        "        os.rename(temporary, path)\n        sync(path)\n",
        "test_the_data_are_on_the_disk_before_the_name", "the directory was not fsynced",
    ),
    Mistake(
        "ex5_commit", "    sync(path.parent)\n", "",
        "test_the_name_is_on_the_disk_when_commit_returns", "a power loss may undo it",
    ),
    Mistake(
        "ex5_commit", 'temporary = hidden(path, "tmp")', "temporary = path",
        "test_killed_anywhere_it_is_complete_or_absent", "half of it has the name",
    ),
    Mistake(
        "ex5_commit", 'temporary = hidden(path, "tmp")', 'temporary = path.with_name(".tmp")',
        "test_killed_anywhere_it_is_complete_or_absent", "FileExistsError",
    ),
    Mistake(
        "ex5_commit", "        shutil.rmtree(temporary, ignore_errors=True)\n", "",
        "test_a_failure_on_the_way_leaves_nothing[1]", "fsync number 2 failed",
    ),
    Mistake(
        "ex5_commit", "key=step_of, default", "key=str, default",
        "test_the_latest_is_by_number_and_of_complete_ones", "as a text, '9' is after '10'",
    ),
    Mistake(
        "ex5_commit", "        os.rename(path, trash)\n        shutil.rmtree(trash)\n",
        "        shutil.rmtree(path)\n",
        "test_rotation_killed_anywhere_leaves_no_half_checkpoint", "rename it out of sight",
    ),
    # Packing
    Mistake(
        "ex6_packing", "torch.arange(len(input_ids)) - first[segments]",
        "torch.arange(len(input_ids))",
        "test_positions_begin_anew_in_each_sentence", "from its own first token",
    ),
    Mistake(
        "ex6_packing", "attention_mask=may_see(row.segments)[None, None],", "",
        "test_the_logits_are_those_of_the_padded_batch", "All are wrong: attention has no mask",
    ),
    Mistake(
        "ex6_packing", "last_hidden_state[0, row.first]",
        "last_hidden_state[0, torch.zeros_like(row.first)]",
        "test_the_logits_are_those_of_the_padded_batch", "the head read the row's first token",
    ),
    Mistake(
        "ex6_packing", "return segments[:, None] == segments[None, :]",
        "return (segments[:, None] == segments[None, :]).tril()",
        "test_a_token_sees_its_own_sentence_and_no_other", "BERT is no decoder",
    ),
    Mistake(
        "ex6_packing", "scores = scores.masked_fill(~may_see(segments), -torch.inf)",
        "seen = may_see(segments)",
        "test_attention_is_that_of_each_sentence_alone", "the mask does nothing",
    ),
    Mistake(
        "ex6_packing", " / query.shape[-1] ** 0.5", "",
        "test_attention_is_that_of_each_sentence_alone", "not divided by sqrt(d)",
    ),
    Mistake(
        "ex6_packing", "[0, row.first]", "[0, row.first].detach()",
        "test_the_gradients_are_those_of_the_padded_batch[1]", "no gradient",
    ),
]  # fmt: skip


def numbered(mistakes: list[Mistake]) -> list[tuple[int, Mistake]]:
    """Each mistake and its number among those of its exercise."""
    exercises = [mistake.exercise for mistake in mistakes]
    return [(exercises[:place].count(m.exercise), m) for place, m in enumerate(mistakes)]


@pytest.fixture(scope="module")
def outcomes_of_round(tmp_path_factory):
    """The outcomes of a session with one mistake in each exercise: those of this number."""

    @functools.cache
    def outcomes_of_number(number: int) -> dict[str, str]:
        answers, tests = tmp_path_factory.mktemp("answers"), []
        for mistake in (mistake for own, mistake in numbered(MISTAKES) if own == number):
            solution = (SOLUTIONS / f"{mistake.exercise}.py").read_text()
            assert mistake.right in solution, mistake
            wrong = solution.replace(mistake.right, mistake.wrong)
            (answers / f"{mistake.exercise}.py").write_text(wrong)
            name = mistake.exercise.partition("_")[2]
            tests.append(f"examples/exercises/test_{name}.py::{mistake.test}")
        return outcomes_of(" ".join(tests), answers / "base", answers)

    return outcomes_of_number


@pytest.mark.parametrize(("number", "mistake"), numbered(MISTAKES), ids=str)
def test_a_mistake_is_named(number, mistake, outcomes_of_round):
    said = outcomes_of_round(number)[mistake.test]
    assert mistake.says in said, said or "passed"
