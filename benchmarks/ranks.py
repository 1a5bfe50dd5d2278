"""Two processes of one thread beside one of two threads: minilora, and HF Trainer + PEFT under torchrun.

    python benchmarks/ranks.py --train train.tsv                       (--model M, --repeats N, --steps N)

The file is headerless `text<TAB>label` lines. A step has 32 examples in all, whoever shares them. Every
contestant is started once, then again, `--repeats` times over: examples per second, medians and spread, and of
all its processes the time on cores, which other work on the machine changes less, and peak memory. Of two: the bytes of gradients that a step's all-reduce is given, counted
where torch hands them over and held against the trainable parameters, and its time. Whoever comes first waits
for the other: of a step the shorter time of both is the sum's own. The last line is JSON.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measured

EXAMPLES = 32  # of a step
CONTESTANTS = {
    "minilora, 1 process x 2 threads": ("minilora", 1, 2, {}),
    "minilora, 2 processes x 1 thread": ("minilora", 2, 1, {}),
    "minilora, 1 x 1": ("minilora", 1, 1, {}),
    "Trainer + PEFT, 1 x 2": ("trainer", 1, 2, {}),
    "Trainer + PEFT, 2 x 1": ("trainer", 2, 1, {}),
    "minilora --hf_parity, 2 x 1": ("minilora", 2, 1, {"hf_parity": True}),
}


def count_gradients(found: dict) -> None:
    """Into `found`: trainable parameters, and of each bucket that is summed its bytes and seconds; of
    other sums the number.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    built, sum_up = DistributedDataParallel.__init__, torch.distributed.all_reduce
    found |= {"parameters": 0, "bytes": [], "seconds": [], "other_sums": 0}

    def summed(_, bucket):
        gradients, start = bucket.buffer(), time.perf_counter()
        found["bytes"].append(gradients.nbytes)
        gradients.div_(torch.distributed.get_world_size())

        def end(future):
            found["seconds"].append(time.perf_counter() - start)
            return future.value()[0]

        return sum_up(gradients, async_op=True).get_future().then(end)

    def build(self, module, *given, **named):
        built(self, module, *given, **named)
        found["parameters"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.register_comm_hook(None, summed)

    def counted(*given, **named):
        found["other_sums"] += 1
        return sum_up(*given, **named)

    DistributedDataParallel.__init__, torch.distributed.all_reduce = build, counted


def work(name: str, settings: dict) -> None:
    """One process of a contestant."""
    found: dict = {}
    if "RANK" in os.environ:
        count_gradients(found)
    if name == "minilora":  # its processes share a directory
        settings["output_dir"] = f"{settings['found']}/out"
    place = Path(settings.pop("found"), os.environ.get("RANK", "0"))
    found |= getattr(measured, name)(**settings)
    # Linux counts kilobytes.
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    place.write_text(json.dumps(found))


def run(name: str, processes: int, threads: int, settings: dict) -> dict:
    """What a contestant's processes found, together."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as directory:
        settings = {**settings, "batch": EXAMPLES // processes, "found": directory}
        command = [
            *(start if processes > 1 else []),
            __file__,
            "--work",
            name,
            json.dumps(settings),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment
        )
        if result.returncode != 0:
            raise SystemExit(f"{name} {settings} failed:\n{result.stderr[-2000:]}")
        ranks = [json.loads(Path(directory, str(rank)).read_text()) for rank in range(processes)]
    first, steps = ranks[0], settings["steps"]
    together = {
        "per_second": EXAMPLES / first["seconds_per_step"],
        "core_ms": 1000 * sum(rank["core_seconds_per_step"] for rank in ranks),
        "peak_mb": sum(rank["peak_mb"] for rank in ranks),
    }
    if processes > 1:
        buckets = len(first["bytes"]) // steps  # of a step; minilora sums once before the first
        times = zip(*(rank["seconds"][-steps * buckets :] for rank in ranks), strict=True)
        shorter = [min(both) for both in times]
        together |= {
            "parameters": first["parameters"],
            "bytes_per_step": sum(first["bytes"][-buckets:]),
            "ms_per_step": 1000 * statistics.median(shorter) * buckets,
            "other_sums_per_step": first["other_sums"] / steps,
        }
    return together


def show(label: str, results: list[dict]) -> dict:
    """Print a contestant's row; return its medians."""
    row = {key: statistics.median(result[key] for result in results) for key in results[0]}
    speeds = [result["per_second"] for result in results]
    spread = f"{min(speeds):.4g} to {max(speeds):.4g}"
    costs = f"{row['core_ms']:5.0f} ms of cores a step  {row['peak_mb']:.0f} MB"
    print(f"{label:34} {row['per_second']:7.4g} examples/s ({spread})  {costs}")
    if "parameters" in row:
        is_four = row["bytes_per_step"] == 4 * row["parameters"]
        print(
            f"    gradients: {row['bytes_per_step']} bytes a step, of {row['parameters']} parameters:"
            f" {'4 bytes each' if is_four else 'NOT 4 bytes each'}; {row['ms_per_step']:.2f} ms;"
            f" {row['other_sums_per_step']:.1f} other sums"
        )
    return row


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--model", help="a directory; by default the packaged MiniLM")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14)
    asked = parser.parse_args()
    if asked.model is None:
        from minilora.bert.load import packaged_model

        asked.model = str(packaged_model())
    common = {
        "model": asked.model, "train": str(Path(asked.train).resolve()), "steps": asked.steps,
        "accumulation": 1, "dtype": "float32", "max_length": 512, "targets": ["query", "value"],
    }  # fmt: skip
    results: dict[str, list[dict]] = {label: [] for label in CONTESTANTS}
    for _ in range(asked.repeats):
        for label, (name, processes, threads, flags) in CONTESTANTS.items():
            results[label].append(run(name, processes, threads, {**common, **flags}))
            print(f"{label}: {results[label][-1]}", file=sys.stderr, flush=True)
    print(json.dumps({label: show(label, found) for label, found in results.items()}))


if __name__ == "__main__":
    main()
