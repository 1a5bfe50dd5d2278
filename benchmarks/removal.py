"""What each part of a checkpoint is for: one that is resumed whole, and without one part at a time.

    python benchmarks/removal.py             measure, write docs/figures/removal.json, draw
    python benchmarks/removal.py --quick     a few steps: which step differs first; writes nothing
    python benchmarks/removal.py --draw      draw again, from the JSON
    python benchmarks/removal.py --tables    print the tables of docs/04_checkpoint.md from the JSON

The command's default run (MiniLM, the packaged sentences, packed batches, dropout) of 200 steps,
resumed at step 100, in the midst of an epoch. minilora refuses a checkpoint that lacks a part, so a
resume restores the whole of it, and then one part is put back to what it was before: what it would
be without its file. The loss scale is float16's: the same model in torch.autocast, in a loop of its
own. A few minutes on two cores.
"""

import argparse
import contextlib
import copy
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import figures

RESULTS = figures.FIGURES / "removal.json"
SEED, STEPS, MIDDLE, EVAL_STEPS = 42, 200, 100, 10
# Of the loss scale's run. torch lets the scale grow after 2,000 steps without an overflow; here it
# is after 4, so that there is something to lose.
HALF_STEPS, HALF_MIDDLE, GROWTH_INTERVAL, BATCH = 48, 24, 4, 8


# ---- the parts: each function takes a training that has just been built, and returns what puts
# that part back there
def nothing(training) -> Callable[[], Any]:
    return lambda: None


def optimizer(training) -> Callable[[], Any]:
    fresh = copy.deepcopy(training.optimizer.state_dict())
    return lambda: training.optimizer.load_state_dict(fresh)


def scheduler(training) -> Callable[[], Any]:
    fresh = copy.deepcopy(training.scheduler.state_dict())
    return lambda: training.scheduler.load_state_dict(fresh)


def both(training) -> Callable[[], Any]:
    parts = [optimizer(training), scheduler(training)]
    return lambda: [put_back() for put_back in parts]


def generators(training) -> Callable[[], Any]:
    from minilora.training.rng import rng_state, set_rng_state

    fresh = rng_state(training.model)
    return lambda: set_rng_state(fresh, training.model)


def position(training) -> Callable[[], Any]:
    return lambda: setattr(training.state, "step_in_epoch", 0)


def scale(training) -> Callable[[], Any]:
    fresh = copy.deepcopy(training.scaler.state_dict())
    return lambda: training.scaler.load_state_dict(fresh)


def adapter(training) -> Callable[[], Any]:
    return values(training, is_lora=True)


def head(training) -> Callable[[], Any]:
    return values(training, is_lora=False)


def values(training, is_lora: bool) -> Callable[[], Any]:
    import torch

    from minilora import trainable_parameters

    named = trainable_parameters(training.model)
    parameters = [p for name, p in named if ("lora_" in name) is is_lora]
    fresh = [parameter.detach().clone() for parameter in parameters]

    def put_back() -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, fresh, strict=True):
                parameter.copy_(value)

    return put_back


PARTS = [nothing, generators, position, optimizer, scheduler, both, head, adapter]

# What it is called, and what transformers 5.23 Trainer does without it.
NAMES = {
    "nothing": ("nothing", "the same"),
    "generators": ("the generators", "resumes silently"),
    "position": ("the place in the epoch", "the same, if asked to (`ignore_data_skip`)"),
    "optimizer": ("the optimizer", "resumes silently, without the scheduler, too"),
    "scheduler": ("the scheduler", "resumes silently, without the optimizer, too"),
    "both": ("optimizer and scheduler", "resumes silently"),
    "head": ("the head", "an exception"),
    "adapter": ("A and B", "resumes silently"),
    "scale": ("the loss scale", "resumes silently"),
}


# ---- measuring
@contextlib.contextmanager
def left_out(part: Callable[[Any], Callable[[], Any]]) -> Iterator[None]:
    """Inside, a resume restores the whole checkpoint, and then puts one part back."""
    from minilora.training import run_directory

    restore = run_directory.restore

    def restore_but_one(stored, training):
        put_back = part(training)
        state = restore(stored, training)
        put_back()
        return state

    run_directory.restore = restore_but_one
    try:
        yield
    finally:
        run_directory.restore = restore


def measure(directory: Path) -> dict:
    """The true run's losses and scores, and those of each resumed one."""
    from minilora import TrainConfig, fine_tune

    how = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": EVAL_STEPS}
    how |= {"save_strategy": "steps", "save_steps": MIDDLE, "device": "cpu"}
    true = directory / "true"
    result = fine_tune(TrainConfig(**how, seed=SEED, max_steps=STEPS, output_dir=true))
    expected = numbers_of(result.log_history)
    found = {"true": {name: rounded(values) for name, values in expected.items()}}
    for part in PARTS:
        place = directory / part.__name__
        config = {"resume_from_checkpoint": true / f"checkpoint-{MIDDLE}", "output_dir": place}
        with left_out(part):
            result = fine_tune(TrainConfig(**how, **config))
        found[part.__name__] = compared(numbers_of(result.log_history), expected, MIDDLE)
        found[part.__name__] |= tensors_compared(place, true)
        print(part.__name__, found[part.__name__]["first_step"], flush=True)
    return found


def numbers_of(rows: list[dict]) -> dict[str, dict[int, float]]:
    """By name and step."""
    names = ("loss", "learning_rate", "scale", "eval_loss", "eval_accuracy")
    return {name: {r["step"]: r[name] for r in rows if name in r} for name in names}


def compared(numbers: dict, expected: dict, middle: int) -> dict:
    """What happened after the middle, and by how much each loss differs from the true one."""
    late = {n: {s: v for s, v in of.items() if s > middle} for n, of in numbers.items()}
    differences = {step: abs(late["loss"][step] - expected["loss"][step]) for step in late["loss"]}
    firsts = [step for step, difference in differences.items() if difference]
    return {
        **{name: rounded(values) for name, values in late.items() if values},
        "difference": rounded(differences),
        "first_step": firsts[0] if firsts else None,
    }


def rounded(values: dict[int, float]) -> list[list[float]]:
    return [[step, float(f"{value:.7g}")] for step, value in values.items()]


def tensors_compared(place: Path, true: Path) -> dict:
    """How far the final tensors are from the true ones, in units of the true run's own way there
    from the middle on.
    """
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    begin, end = load_file(true / f"checkpoint-{MIDDLE}" / name), load_file(true / name)
    here = load_file(place / name)

    def distance(one: dict, other: dict) -> float:
        return sum((one[key] - other[key]).square().sum().item() for key in one) ** 0.5

    ratio = distance(here, end) / distance(begin, end)
    same = (true / name).read_bytes() == (place / name).read_bytes()
    return {"distance": float(f"{ratio:.3g}"), "same_bytes": same}


def measure_scale(directory: Path) -> dict:
    """The same for the loss scale: float16 activations and gradients, float32 weights."""
    true = train_in_half(directory, range(HALF_STEPS))
    expected = numbers_of(true)
    found: dict = {"true": {name: rounded(values) for name, values in expected.items()}}
    for name, part in (("nothing", nothing), ("scale", scale)):
        rows = train_in_half(directory, range(HALF_MIDDLE, HALF_STEPS), part)
        found[name] = compared(numbers_of(rows), expected, HALF_MIDDLE)
    return found


def train_in_half(directory: Path, steps: range, part=nothing) -> list[dict]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    from minilora import (
        LoraConfig,
        Training,
        add_adapter,
        load_checkpoint,
        save_checkpoint,
        trainable_parameters,
    )
    from minilora.bert.load import packaged_model
    from minilora.bert.splits import SENTENCES

    lines = (SENTENCES / "train.tsv").read_text().splitlines()[1 : 1 + BATCH * HALF_STEPS]
    texts, labels = zip(*(line.split("\t")[:2] for line in lines), strict=True)
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    model = AutoModelForSequenceClassification.from_pretrained(packaged_model(), num_labels=2)
    add_adapter(model, LoraConfig(lora_alpha=16, lora_dropout=0.1, task_type="SEQ_CLS"))
    parameters = [p for _, p in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=GROWTH_INTERVAL)
    scaler.scale(torch.ones(()))  # it knows its scale from its first use on
    training = Training(model, optimizer, constant, scaler=scaler)
    if steps.start:
        put_back = part(training)
        load_checkpoint(directory / f"checkpoint-{HALF_MIDDLE}", training)
        put_back()
    model.train()
    for step in steps:
        here = slice(step * BATCH, (step + 1) * BATCH)
        batch = tokenizer(list(texts[here]), padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([int(label == "positive") for label in labels[here]])
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        begun = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # nothing, where a gradient overflowed
        scaler.update()
        optimizer.zero_grad()
        training.state.global_step = step + 1
        row = {"step": step + 1, "loss": loss.item(), "scale": begun}
        training.state.log_history.append(row)
        if step + 1 == HALF_MIDDLE and not steps.start:
            save_checkpoint(directory, training)
    return training.state.log_history


# ---- telling
def tables(results: dict) -> list[str]:
    parts, half = results["parts"], results["half"]
    head = ["left out", "first step that differs", "mean difference of 10 losses", "of 50"]
    rows = [[*head, "final tensors off by", "validation loss", "accuracy", "HF Trainer without it"]]
    for name in (name for name in NAMES if name in parts):
        found, (called, trainers) = parts[name], NAMES[name]
        scores = [f"{found[score][-1][1]:.3f}" for score in ("eval_loss", "eval_accuracy")]
        off = f"{found['distance']:.2f}" if found["distance"] else "0"
        rows.append([called, *differences(found), off, *scores, trainers])
    of_scale = [[*head[:3], "updates skipped in 24 steps", "HF Trainer without it"]]
    for name in ("nothing", "scale"):
        found, (called, trainers) = half[name], NAMES[name]
        of_scale.append([called, *differences(found), str(skipped(found)), trainers])
    return [markdown(rows), markdown(of_scale)]


def markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(found: dict) -> list[str]:
    """The first step that differs, the mean difference of the next 10 losses and, if there are as
    many, 50.
    """
    values = [value for _, value in found["difference"]]
    first = "none" if found["first_step"] is None else f"{found['first_step']}"
    means = [sum(values[:count]) / count for count in (10, 50) if len(values) >= count]
    return [first, *(f"{mean:.2g}" if mean else "0" for mean in means)]


def skipped(found: dict) -> int:
    """Updates after which the scale was lower."""
    scales = [value for _, value in found["scale"]]
    return sum(later < earlier for earlier, later in itertools.pairwise(scales))


def draw(axes, results: dict) -> None:
    """For each part the loss, the true run's and the resumed one's, and under it by how much they
    differ.
    """
    axes[0, 0].get_gridspec().set_height_ratios([1.25, 1] * 3)
    shown = [(name, results["parts"], MIDDLE, STEPS) for name in NAMES if name != "scale"]
    shown.append(("scale", results["half"], HALF_MIDDLE, HALF_STEPS))
    for number, (name, found, middle, last) in enumerate(shown):
        row, column = divmod(number, 3)
        upper, lower = axes[2 * row, column], axes[2 * row + 1, column]
        draw_part(upper, lower, name, found, middle, last)
        if column == 0:
            upper.set_ylabel("loss")
            lower.set_ylabel("difference")
        else:
            upper.set_yticklabels([])
            lower.set_yticklabels([])
        lower.set_xlabel("step" if row == 2 else " ")
    axes[0, 0].set_title("Nothing left out", loc="left")
    axes[0, 0].legend(["resumed", "undisturbed"], loc="upper right", borderaxespad=0)


def draw_part(upper, lower, name: str, found: dict, middle: int, last: int) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, NullLocator

    true, resumed = dict(found["true"]["loss"]), dict(found[name]["loss"])
    ink, colour = pyplot.rcParams["text.color"], figures.COLOURS[3]
    begin = middle - (last - middle) // 4
    joined = {**{step: loss for step, loss in true.items() if step <= middle}, **resumed}
    width = 10 if last > 100 else 4
    called = NAMES[name][0]
    upper.set_title(called[0].upper() + called[1:], loc="left")
    for losses, first, style in (
        (joined, middle, {"color": colour, "linewidth": 2.2}),
        (true, begin, {"color": ink, "linewidth": 1.0}),
    ):
        steps = range(first, last + 1)
        means = [sum(losses[s - k] for k in range(width)) / width for s in steps]
        upper.plot(steps, means, **style)
    steps, values = zip(*found[name]["difference"], strict=True)
    lower.plot(steps, [value or None for value in values], ".", color=colour, markersize=3)
    lower.set_yscale("log")
    lower.set_ylim(1e-5, 9)
    lower.set_yticks([1e-4, 1e-2, 1], ["0.0001", "0.01", "1"])
    lower.yaxis.set_minor_locator(NullLocator())
    if not any(values):
        lower.text(
            (middle + last) / 2, 1e-2, f"0 at all\n{len(values)} steps", ha="center", va="center"
        )
    for axis in (upper, lower):
        axis.axvline(middle, color=ink, linewidth=0.8, linestyle=(0, (2, 2)))
        axis.set_xlim(begin, last)
        axis.set_xticks([middle, (middle + last) // 2, last])
    upper.set_ylim(0, 1)
    upper.set_yticks([0, 0.5, 1])
    upper.xaxis.set_major_formatter(NullFormatter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        globals().update(STEPS=8, MIDDLE=4, EVAL_STEPS=4, HALF_STEPS=8, HALF_MIDDLE=4)
        measure_all()
        return
    if not asked.tables and not asked.draw:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure_all()) + "\n")
    results = json.loads(RESULTS.read_text())
    if not asked.tables:
        figures.save("removal", lambda axes: draw(axes, results), size=(8.3, 8.3), shape=(6, 3))
    print("\n\n".join(tables(results)))


def measure_all() -> dict:
    from minilora.training.record import environment

    found: dict = {"seed": SEED, "steps": STEPS, "middle": MIDDLE, "machine": MACHINE}
    found["environment"] = environment("cpu")
    with tempfile.TemporaryDirectory() as directory:
        found["parts"] = measure(Path(directory))
        found["half"] = measure_scale(Path(directory) / "half")
    return found


MACHINE = "two cores of a shared x86 server (Xeon, AVX512)"

if __name__ == "__main__":
    main()
