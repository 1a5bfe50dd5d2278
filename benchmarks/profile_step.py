"""Where the time of a training step goes: torch's operators, their calls, the share of matrix products.

    python benchmarks/profile_step.py --train train.tsv [--dtypes float32 bfloat16] [--output FILE.json]

MiniLM ([demo] extra, or the directory `--model`), batch 32, r=8 on query and value, packed; the command's own run, under torch.profiler. That counts
each operator's milliseconds without those that it calls, adds some microseconds to each call, and does not see
numpy, which draws the masks. `--table FILE` prints again what was written.
"""

import argparse
import datetime
import json
from pathlib import Path

WARM_UP, STEPS, BATCH, SHOWN = 3, 8, 32, 24
PRODUCTS = ("aten::addmm", "aten::mm")


def operators(model: str, train: str, dtype: str) -> dict[str, tuple[float, float]]:
    """Milliseconds and calls a step of each operator, the most costly first."""
    import measured
    from torch.profiler import ProfilerActivity, profile

    from minilora.training import loop

    profiler, step, taken = profile(activities=[ProfilerActivity.CPU]), loop.training_step, []

    def profiled(*arguments):
        if len(taken) == WARM_UP:
            profiler.start()
        taken.append(step(*arguments))
        if len(taken) == WARM_UP + STEPS:
            profiler.stop()
        return taken[-1]

    settings = {
        "model": model, "train": train, "steps": WARM_UP + STEPS, "batch": BATCH,
        "accumulation": 1, "dtype": dtype, "max_length": 128, "targets": ["query", "value"],
    }  # fmt: skip
    loop.training_step = profiled
    try:
        measured.measure("minilora", settings)
    finally:
        loop.training_step = step
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return {
        row.key: (round(row.self_cpu_time_total / 1e3 / STEPS, 3), row.count / STEPS)
        for row in rows
    }


def table(results: dict) -> str:
    """In markdown: the most costly operators of the first dtype, then all together."""
    found = results["operators"].values()
    whole = [[sum(column) for column in zip(*of.values(), strict=True)] for of in found]
    lines = [f"| a step | {' | '.join(f'{dtype}, ms | calls' for dtype in results['operators'])} |"]
    lines += ["|---|" + "---|---|" * len(found)]
    for name in list(next(iter(found)))[:SHOWN]:
        lines.append(f"| {name} | {figures(of.get(name, (0, 0)) for of in found)} |")
    lines.append(f"| all {max(map(len, found))} | {figures(whole)} |")
    shares = [
        sum(of[n][0] for n in PRODUCTS) / ms for of, (ms, _) in zip(found, whole, strict=True)
    ]
    lines.append(f"| products among them | {' | '.join(f'{share:.2f} |' for share in shares)} |")
    return "\n".join(lines)


def figures(cells) -> str:
    return " | ".join(f"{ms:.1f} | {calls:.0f}" for ms, calls in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", help="headerless tsv of `text<TAB>label`")
    parser.add_argument("--model", help="a directory; by default the packaged MiniLM")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--table", type=Path, help="print such a file, and measure nothing")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.table.read_text())))
        return
    import compare
    from table import versions

    from minilora.bert.load import packaged_model

    model = asked.model or str(packaged_model())
    results = {
        "date": datetime.date.today().isoformat(), "commit": compare.commit(), "machine": compare.cpu(),
        "versions": versions(), "texts": "/".join(Path(asked.train).parts[-2:]),
        "operators": {dtype: operators(model, asked.train, dtype) for dtype in asked.dtypes},
    }  # fmt: skip
    if asked.output:
        asked.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
