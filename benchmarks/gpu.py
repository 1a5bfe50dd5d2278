"""minilora beside HF Trainer + PEFT on one GPU: the same data, model and hyper-parameters.

    python benchmarks/gpu.py --train train.tsv --model DIRECTORY [--only "base, bfloat16, batch (32|128)"]
    python benchmarks/gpu.py --train train.tsv --model DIRECTORY --profile     where a step's time goes

The file holds headerless `text<TAB>label` lines; DIRECTORY a BERT and its tokenizer. In one process, so
that a contestant's start is paid once: each trains a block of steps from the beginning, in turn, `--repeats`
times over; the first `--warm_up` steps of a block, in which kernels are chosen, compiled and recorded, are not timed,
and how long a whole block took is printed, too. Prints medians of examples per second, their spread, ratios and peak GPU memory; rows where
minilora loses are printed like the others. The last line is JSON.
"""

import argparse
import contextlib
import gc
import io
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import measured
import torch
import transformers
from compare import QUERY_VALUE, bert_shape
from measured import minilora, trainer

LONGEST = 128
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# What is not BERT-base's; None is the model as it was given.
SHAPES = {"MiniLM": None, "BERT-base": {}, "BERT-large": LARGE}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter to try the script itself


def contestants(dtype: str) -> dict:
    """{label: (function of measured.py, its settings)}, minilora's default first."""
    return {
        "minilora": (minilora, {"dtype": dtype}),
        "minilora, padded": (minilora, {"dtype": dtype, "batching": "padded"}),
        "minilora, compiled": (minilora, {"dtype": dtype, "torch_compile": True}),
        "Trainer + PEFT": (trainer, {"dtype": dtype}),
        "Trainer + PEFT, compiled": (trainer, {"dtype": dtype, "torch_compile": True}),
        "Trainer + PEFT, grouped": (trainer, {"dtype": dtype, "grouped": True}),
    }


def block(function, settings: dict) -> dict:
    """One block: examples per second after the warm-up, and the peak of GPU memory in MB."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.time()
    with quiet():
        found = function(**settings, device=DEVICE)
    seconds = time.time() - start
    memory = torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else 0.0
    per_second = settings["batch"] / found["seconds_per_step"]
    return {"per_second": per_second, "memory": memory, "seconds": seconds}


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def row(title: str, settings: dict, dtype: str, asked: argparse.Namespace) -> dict:
    """Every contestant in turn, `repeats` times over, printed."""
    chosen = [label for label in contestants(dtype) if re.fullmatch(asked.contestants, label)]
    found: dict[str, list[dict]] = {label: [] for label in chosen}
    for _ in range(asked.repeats):
        for label in chosen:
            function, own = contestants(dtype)[label]
            found[label].append(block(function, {**settings, **own}))
    print(f"\n{title}")
    medians = {}
    for label, results in found.items():
        speeds = [result["per_second"] for result in results]
        medians[label] = statistics.median(speeds)
        memory = max(result["memory"] for result in results)
        spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
        ratio = medians[chosen[0]] / medians[label]
        took = ", ".join(f"{result['seconds']:.0f}" for result in results)
        print(f"  {label:26}{medians[label]:7.0f} examples/s  ({spread})  {memory:6.0f} MB  "
              f"{chosen[0]} is {ratio:.2f} x as fast; blocks of {took} s", flush=True)  # fmt: skip
    return {title: found}


def profile(settings: dict, label: str, dtype: str) -> None:
    """Where the time of a contestant's steps goes: operators by time of the host, and of the GPU."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    function, own = contestants(dtype)[label]
    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        block(function, {**settings, **own})
    events = prof.key_averages()
    started = sum(
        e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
    )
    print(f"\nprofile of {label}, {dtype}, {settings['steps']} steps of {settings['batch']}, the start "
          f"included: {started} kernels")  # fmt: skip
    for key in ("self_cpu_time_total", "self_device_time_total"):
        print(events.table(sort_by=key, row_limit=14, max_name_column_width=44))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--warm_up", type=int, default=60, help="of them, not timed")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--only", default="", help="rows in whose title this pattern is found")
    parser.add_argument("--contestants", default=".*", help="those whose names match this pattern")
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    assert not torch.backends.cuda.matmul.allow_tf32
    transformers.logging.set_verbosity_error()
    measured.WARM_UP = asked.warm_up
    start, table = time.time(), {}
    with tempfile.TemporaryDirectory() as directory:
        for shape, dtype, batch in [
            (s, d, b) for s in SHAPES for d in ("float32", "bfloat16") for b in asked.batches
        ]:
            title, model = f"{shape}, {dtype}, batch {batch}", Path(asked.model)
            if not re.search(asked.only, title):
                continue
            if SHAPES[shape] is not None:
                model = Path(directory, shape)
                if not model.exists():
                    bert_shape(asked.model, model, **SHAPES[shape])
            settings = {
                "model": str(model), "train": asked.train, "steps": asked.steps, "batch": batch,
                "accumulation": 1, "max_length": LONGEST, "targets": QUERY_VALUE,
            }  # fmt: skip
            if not asked.profile:
                table |= row(title, settings, dtype, asked)
                continue
            for label in ("minilora", "minilora, padded", "Trainer + PEFT"):
                profile(settings, label, dtype)
    print(f"\n{time.time() - start:.0f} s in all")
    print(json.dumps(table))


if __name__ == "__main__":
    sys.exit(main())
