"""How much of a batch is padding, what packing leaves of it, and what that saves of a step.

    python benchmarks/packing.py [--tables] [--quick]

Counts are of the packaged sentences in MiniLM's tokens ([demo] extra); a step is a forward and a
backward pass of a random model of MiniLM's shape, padded and packed in turn, on one thread. About
two minutes; --quick takes one pair of steps, and writes nothing. Writes docs/figures/packing.json and its pictures; --tables
prints what is there.
"""

import argparse
import copy
import json
import platform
import time
from pathlib import Path

import figures

RESULTS = figures.FIGURES / "packing.json"
SEED, PAIRS, SHOWN = 42, 10, 8
ORDERS = ("random", "sorted")
LENGTHS = {"random": "in random order", "sorted": "sorted by length", "equal": "all of 24 tokens"}


def packaged_examples():
    """The packaged sentences for training, as tokens of MiniLM."""
    from minilora import TrainConfig
    from minilora.bert import load
    from minilora.bert.dataset import tokenize
    from minilora.bert.splits import read_splits
    from minilora.bert.tasks import build_task

    config = TrainConfig()
    splits = read_splits(config)
    tokenizer = load.load_tokenizer(str(load.packaged_model()), None)
    task = build_task(config, splits.labels)
    return tokenize(splits.rows["train"], task, tokenizer, 512, "packaged", keep=False)


def order_of(lengths, name):
    from minilora.bert.dataset import epoch_order

    return (
        lengths.argsort(kind="stable") if name == "sorted" else epoch_order(len(lengths), SEED, 0)
    )


def count(lengths, order, batch):
    """Shares of padding: in a rectangle's tokens, and in the scores of attention, which grow with
    the square of the length, padded and packed in buckets.
    """
    import torch

    from minilora.bert.packing import layout_of

    tokens = real = scores = bucketed = needed = 0
    for start in range(0, len(order), batch):
        part = lengths[order[start : start + batch]]
        tokens, real = tokens + len(part) * part.max(), real + part.sum()
        scores, needed = scores + len(part) * part.max() ** 2, needed + (part**2).sum()
        layout = layout_of(torch.from_numpy(part[part.argsort(kind="stable")]), heads=1)
        bucketed += sum(bucket.count * bucket.length**2 for bucket in layout.buckets)
    return {
        "tokens": 1 - real / tokens,
        "scores": 1 - needed / scores,
        "packed_scores": 1 - needed / bucketed,
    }


def time_steps(examples, count):
    """Seconds of forward and backward, (packed, padded) of so many pairs, by the order of lengths."""
    import dataclasses

    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    from minilora import LoraConfig, add_adapter
    from minilora.bert.dropout import MaskStream, use_fast_dropout
    from minilora.bert.forward import Packed, Padded
    from minilora.lora.adapters import set_fused

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = AutoModelForSequenceClassification.from_config(config)
    add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1))
    set_fused(model, True)
    use_fast_dropout(model.train(), MaskStream(SEED))
    forwards = [Padded(copy.deepcopy(model), 0), Packed(model, 0)]
    lengths = np.diff(examples.offsets)
    cut = dataclasses.replace(
        examples, offsets=np.arange(1 + len(examples.input_ids) // 24) * 24,
        labels=np.zeros(len(examples.input_ids) // 24, dtype=np.int64),
    )  # fmt: skip
    found = {}
    for name in LENGTHS:
        source = cut if name == "equal" else examples
        order = order_of(np.diff(source.offsets), "random" if name == "equal" else name)
        # Batches from all over: sorted, the first ones are the shortest.
        starts = np.linspace(0, len(order) - 32, count + 1).astype(int)
        pairs = []
        for number, start in enumerate(starts):
            taken = {}
            for forward in forwards if number % 2 else forwards[::-1]:
                began = time.perf_counter()
                batch = forward.collate(source, order[start : start + 32])
                torch.nn.functional.cross_entropy(forward(batch), batch["labels"]).backward()
                taken[type(forward)] = time.perf_counter() - began
            pairs.append((taken[Packed], taken[Padded]))
        found[name] = pairs[1:]
    assert len(lengths) == len(examples)
    return found


def measure(pairs=PAIRS):
    import numpy as np
    import torch
    import transformers

    examples = packaged_examples()
    lengths = np.diff(examples.offsets)
    shares = [
        {"batch": batch, "order": name, **count(lengths, order_of(lengths, name), batch)}
        for batch in (8, 16, 32, 64)
        for name in ORDERS
    ]
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "machine": f"two cores of a shared x86 server ({cpu[0].partition(': ')[2]}), one thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "seed": SEED,
        "sentences": len(lengths),
        "lengths": {"mean": lengths.mean(), "shortest": int(lengths.min()), "longest": int(lengths.max())},
        "shown": sorted(lengths[order_of(lengths, "random")[:SHOWN]].tolist()),
        "shares": shares,
        "seconds": time_steps(examples, pairs),
    }  # fmt: skip


def tables(results: dict) -> list[str]:
    lines = [
        "| batch | order | padding among the tokens | among attention's scores | the same, packed |",
        "|---|---|---|---|---|",
    ]
    for row in results["shares"]:
        shares = " | ".join(f"{row[n]:.0%}" for n in ("tokens", "scores", "packed_scores"))
        lines.append(f"| {row['batch']} | {row['order']} | {shares} |")
    steps = ["| 32 sentences | padded | packed | padded / packed |", "|---|---|---|---|"]
    for name, pairs in results["seconds"].items():
        packed, padded = (sorted(pair[i] for pair in pairs) for i in (0, 1))
        ratios = sorted(pair[1] / pair[0] for pair in pairs)
        times = " | ".join(f"{1000 * middle(values):.0f} ms" for values in (padded, packed))
        spread = f"{middle(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        steps.append(f"| {LENGTHS[name]} | {times} | {spread} |")
    return ["\n".join(lines), "\n".join(steps)]


def middle(values: list[float]) -> float:
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def draw(results: dict) -> None:
    lengths = results["shown"]
    width = lengths[-1]

    def picture(axes):
        for number, length in enumerate(lengths):
            colour = figures.COLOURS[number % (len(figures.COLOURS) - 1)]
            start, rest = number * width, width - length
            axes.barh("padded", length, left=start, color=colour)
            axes.barh("padded", rest, left=start + length, color="#99999955", hatch="///")
            axes.barh("packed", length, left=sum(lengths[:number]), color=colour)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xlabel(f"places of the batch, {len(lengths)} sentences; hatched: padding")

    figures.save("packing", picture, size=(7, 1.7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="print the measured tables")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        print("\n\n".join(tables(measure(pairs=1))))
        return
    if not asked.tables:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1, default=float) + "\n")
        draw(json.loads(RESULTS.read_text()))
    print("\n\n".join(tables(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
