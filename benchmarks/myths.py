"""Five things that people say about LoRA and resuming, measured.

    python benchmarks/myths.py [--tables] [--quick] [--part NAME ...]

Parts: memory, merging (needs runs), accumulation, runs. Each contestant is a fresh process. About six
minutes; --quick takes tiny models and writes nothing. Writes docs/figures/myths.json and its pictures;
--tables prints what is there. Needs the [demo] and [bench] extras.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import figures

RESULTS = figures.FIGURES / "myths.json"
SEED = 42
PARTS = ("memory", "accumulation", "runs")

BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
BATCH, TOKENS = 8, 128
MEMORY = {
    "full": ("all weights", {"targets": None}),
    "full, recomputed": ("all weights, activations recomputed", {"targets": None, "recompute": True}),
    "LoRA": ("LoRA r=8, query and value", {}),
    "LoRA r=64": ("LoRA r=64, query and value", {"r": 64}),
    "LoRA everywhere": ("LoRA r=8, all-linear", {"targets": "all-linear"}),
    "LoRA, recomputed": ("LoRA r=8, query and value, activations recomputed", {"recompute": True}),
}  # fmt: skip
PIECES = ("weights", "gradients", "optimizer", "activations")

# Of one epoch of the packaged sentences in batches of 8, against "one": name, threads, arguments.
PARITY = {"hf_parity": True, "eval_strategy": "steps"}
RUNS = {
    "one": ("the run", 1, {}),
    "again": ("the same again, in another process", 1, {}),
    "two threads": ("two threads", 2, {}),
    "padded": ("padded batches", 1, {"batching": "padded"}),
    "other seed": ("seed 43", 1, {"seed": 43}),
    "parity": ("with `--hf_parity`", 1, {**PARITY, "eval_steps": 133}),
    "parity, evaluated": ("evaluated every 20 steps", 1, {**PARITY, "eval_steps": 20}),
}
AGAINST = {name: "parity" if name.startswith("parity,") else "one" for name in RUNS}


def classifier(sizes, dropout=0.1):
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(SEED)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return AutoModelForSequenceClassification.from_config(BertConfig(**sizes, **rates))


def memory(sizes, targets=("query", "value"), r=8, recompute=False):
    """Bytes of each piece of a step, and the process's growth up to its peak, in MB."""
    import torch

    from minilora import LoraConfig, add_adapter

    for _ in range(2):  # what is imported and prepared at first use is no step's
        classifier(TINY)(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = classifier(sizes).train()
    if targets is not None:
        named = targets if isinstance(targets, str) else list(targets)
        settings = {"r": r, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": named}
        add_adapter(model, LoraConfig(task_type="SEQ_CLS", **settings))
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    batch = {
        "input_ids": torch.randint(1000, 30000, (BATCH, TOKENS)),
        "labels": torch.arange(BATCH) % 2,
    }
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor  # held until backward: no address comes twice

    for step in range(2):
        if step == 0:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(**batch).loss
        else:
            loss = model(**batch).loss
        loss.backward()
        gradients = [p.grad for p in trained if p.grad is not None]
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    pieces = {
        "weights": total([*model.parameters(), *model.buffers()]),
        "gradients": total(gradients),
        "optimizer": total(moments),
        "activations": sum(saved.values()) / 1e6,
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # Linux counts kilobytes
    return pieces | {"peak": peak * 1024 / 1e6, "trained": sum(p.numel() for p in trained)}


def total(tensors):
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def accumulation():
    """Loss and gradient of 27 examples in one batch, and as 8 + 8 + 8 + 3."""
    import numpy as np
    import torch

    from minilora import TrainConfig
    from minilora.bert.examples import Examples
    from minilora.bert.tasks import build_task

    draw = np.random.default_rng(SEED)
    ids, each = draw.integers(1000, 30000, (27, 16)).astype(np.int32), np.arange(27)
    labels = (each % 3 == 0).astype(np.int64)
    examples = Examples(ids.ravel(), None, np.arange(28) * 16, labels, each, truncated=0)
    task = build_task(TrainConfig(), ["no", "yes"])
    parts, whole = np.split(each, [8, 16, 24]), [each]

    def ours(batches, dropout=0.0, dtype=torch.float32, **settings):
        loss, gradients = gradient_of(task, examples, batches, dropout, dtype, settings)
        return loss, torch.cat([g.double().flatten() for g in gradients])

    in_one = {(rate, dtype): ours(whole, rate, dtype)
              for rate, dtype in ((0.0, torch.float32), (0.0, torch.float64), (0.1, torch.float32))}  # fmt: skip
    each_part = [ours([part]) for part in parts]
    mean_of_means = tuple(sum(p[i] for p in each_part) / 4 for i in (0, 1))
    plain = in_one[0.0, torch.float32]
    rows = {
        "one batch of 27": (plain, plain),
        "8 + 8 + 8 + 3, weighted by examples (minilora)": (ours(parts), plain),
        "the same in float64": (ours(parts, dtype=torch.float64), in_one[0.0, torch.float64]),
        "the same with dropout .1, against one batch with it": (
            ours(parts, 0.1),
            in_one[0.1, torch.float32],
        ),
        "8 + 8 + 8 + 3, each mean divided by 4": (mean_of_means, plain),
        "8 + 8 + 8 + 3, means added up (`--hf_parity`)": (ours(parts, hf_parity=True), plain),
    }
    found = {
        name: {
            "loss": loss,
            "norm": gradient.norm().item(),
            "off": ((gradient - other).norm() / other.norm()).item(),
        }
        for name, ((loss, gradient), (_, other)) in rows.items()
    }
    return {"rows": found, "trainer": of_trainer(ids, labels)}


def gradient_of(task, examples, batches, dropout, dtype, settings):
    """(loss, gradients) of one step of minilora's loop."""
    import torch

    from minilora import LoraConfig, TrainConfig, Training, add_adapter, trainable_parameters
    from minilora.bert.forward import Padded
    from minilora.training.loop import training_step

    model = classifier(TINY, dropout)
    add_adapter(model, LoraConfig(task_type="SEQ_CLS", lora_dropout=dropout))
    parameters = [p for _, p in trainable_parameters(model.to(dtype))]
    optimizer, found = torch.optim.SGD(parameters, lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in parameters))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    forward = Padded(model, 0)
    training = Training(model, optimizer, schedule, forward, task)
    made = [forward.collate(examples, indices) for indices in batches]
    losses, _ = training_step(training, TrainConfig(max_grad_norm=0.0, **settings), made)
    return sum(losses), found


def of_trainer(ids, labels):
    """The loss and gradient norm that HF Trainer logs: of 8 + 8 + 8 + 3, and of one batch of 27."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments

    rows = [
        {"input_ids": torch.tensor(row), "labels": int(label)}
        for row, label in zip(ids, labels, strict=True)
    ]
    found = {}
    for name, batch, count in (("8 + 8 + 8 + 3", 8, 4), ("27", 27, 1)):
        model = get_peft_model(classifier(TINY, 0.0), LoraConfig(task_type="SEQ_CLS"))
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                directory, per_device_train_batch_size=batch, gradient_accumulation_steps=count, max_steps=1,
                logging_steps=1, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
                train_sampling_strategy="sequential",
            )  # fmt: skip
            trainer = Trainer(model, arguments, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        row = trainer.state.log_history[0]
        found[name] = {"loss": row["loss"], "norm": float(row["grad_norm"])}
    return found


def run(output_dir, quick=False, **arguments):
    """One run of minilora's: its rows, and where its final adapter lies."""
    from minilora.fine_tuning import run_fine_tuning

    shared = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "logging_steps": 1}
    shared |= {"max_steps": 6} if quick else {}
    lasting = {"save_strategy": "no", "device": "cpu", "output_dir": output_dir}
    result = run_fine_tuning({**shared, **lasting, **arguments}, {}, lambda: False)
    rows = [row for row in result.log_history if "loss" in row]
    return {
        "losses": [[row["loss"], row["grad_norm"]] for row in rows],
        "accuracy": result.metrics["eval_accuracy"],
    }


def merging(adapter):
    """Logits of the packaged validation sentences with the adapter beside W, and folded into it."""
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    import minilora
    from minilora import open_run
    from minilora.bert.dataset import tokenize
    from minilora.bert.forward import Padded
    from minilora.bert.load import packaged_model
    from minilora.bert.splits import read_splits

    opened, rows = open_run(adapter), read_splits(minilora.TrainConfig()).rows["validation"]
    examples = tokenize(rows, opened.task, opened.tokenizer, 512, "validation", keep=False)

    def base(dtype):
        model = AutoModelForSequenceClassification.from_pretrained(packaged_model(), num_labels=2)
        return model.to(dtype).eval()

    def model_of(dtype, merged=None):
        model = base(dtype)
        minilora.load_adapter(model, adapter)
        if merged is not None:
            minilora.merge_adapter(model)
            model.to(merged)
        return model

    @torch.no_grad()
    def logits(model):
        parts = np.array_split(np.arange(len(examples)), 9)
        forward = Padded(model.eval(), 0)
        return torch.cat([forward(forward.collate(examples, part)).double() for part in parts])

    f32, bf16 = torch.float32, torch.bfloat16
    truth, half = logits(model_of(f32)), logits(model_of(bf16))
    pairs = {
        "float32, merged": (logits(model_of(f32, f32)), truth, "float32"),
        "bfloat16": (half, truth, "float32"),
        "merged in float32, then bfloat16": (logits(model_of(f32, bf16)), truth, "float32"),
        "merged in bfloat16": (logits(model_of(bf16, bf16)), truth, "float32"),
        "merged in bfloat16 ": (logits(model_of(bf16, bf16)), half, "bfloat16"),
    }
    compared = {
        name: {
            "against": against,
            "largest": (found - other).abs().max().item(),
            "mean": (found - other).abs().mean().item(),
            "changed": int((found.argmax(1) != other.argmax(1)).sum()),
        }
        for name, (found, other, against) in pairs.items()
    }
    back = {}
    for dtype in (f32, bf16):
        before = {n: p.clone() for n, p in base(dtype).named_parameters()}
        peft = PeftModel.from_pretrained(base(dtype), adapter)
        peft.merge_adapter()
        peft.unmerge_adapter()
        ours = model_of(dtype)
        minilora.merge_adapter(ours)
        minilora.unmerge_adapter(ours)
        back[str(dtype).removeprefix("torch.")] = {
            "PEFT": differing(before, peft.get_base_model()),
            "minilora": differing(before, ours),
        }
    spread = truth.std().item()
    return {"count": len(examples), "spread": spread, "rows": compared, "unmerged": back}


def differing(before, model):
    """[elements of adapted weights that are not what they were before merging, all of them]."""
    import torch

    pairs = [
        (parameter, before[name.replace(".base_layer", "")])
        for name, parameter in model.named_parameters()
        if name.endswith("base_layer.weight")
    ]
    assert pairs and all(isinstance(old, torch.Tensor) for _, old in pairs)
    return [
        sum(int((new != old).sum()) for new, old in pairs),
        sum(old.numel() for _, old in pairs),
    ]


def in_a_process(function, threads=1, **settings):
    """What a function of this file returns in a process of its own."""
    flags = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--call", function, json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **flags})
    return json.loads(done.stdout.splitlines()[-1])


def first_difference(one, other):
    """The first step, from 1, whose loss or gradient norm is another; None if none is."""
    steps = [
        i for i, pair in enumerate(zip(one, other, strict=True), start=1) if pair[0] != pair[1]
    ]
    return steps[0] if steps else None


def measure(parts, quick):
    import torch
    import transformers

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    found = {
        "machine": f"two cores of a shared x86 server ({cpu[0].partition(': ')[2]})",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "seed": SEED,
    }  # fmt: skip
    if "memory" in parts:
        sizes = TINY if quick else BASE
        found["memory"] = {
            name: in_a_process("memory", sizes=sizes, **settings)
            for name, (_, settings) in MEMORY.items()
        }
    if "accumulation" in parts:
        found["accumulation"] = in_a_process("accumulation")
    if "runs" in parts:
        with tempfile.TemporaryDirectory() as directory:
            runs = {
                name: in_a_process(
                    "run", threads, output_dir=f"{directory}/{name}", quick=quick, **flags
                )
                for name, (_, threads, flags) in RUNS.items()
            }
            found["merging"] = in_a_process("merging", adapter=f"{directory}/one")
        found["runs"] = {
            name: {
                "first": first_difference(values["losses"], runs[AGAINST[name]]["losses"]),
                "steps": len(values["losses"]),
                "loss": sum(loss for loss, _ in values["losses"][-20:])
                / len(values["losses"][-20:]),
                "accuracy": values["accuracy"],
                "losses": [loss for loss, _ in values["losses"]],
            }
            for name, values in runs.items()
        }
    return found


def tables(results: dict) -> list[str]:
    return [make(results) for make in (of_memory, of_merging, of_accumulation, of_runs)]


def of_memory(results):
    lines = ["| a step of | trained | weights | gradients | optimizer | activations | peak |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in results["memory"].items():
        numbers = " | ".join(f"{row[piece]:,.0f}" for piece in (*PIECES, "peak"))
        lines.append(f"| {MEMORY[name][0]} | {row['trained'] / 1e6:.2f} M | {numbers} |")
    return "\n".join(lines)


def of_merging(results):
    found = results["merging"]
    lines = ["| | against, unmerged | largest difference of a logit | mean | predictions changed |", "|---|---|---|---|---|"]  # fmt: skip
    for name, row in found["rows"].items():
        numbers = f"{row['largest']:.1e} | {row['mean']:.1e} | {row['changed']} of {found['count']}"
        lines.append(f"| {name.strip()} | {row['against']} | {numbers} |")
    return "\n".join(lines)


def of_accumulation(results):
    lines = ["| | loss | norm of the gradient | gradient off by |", "|---|---|---|---|"]
    for name, row in results["accumulation"]["rows"].items():
        off = f"{row['off']:.1e}" if row["off"] else "0"
        lines.append(f"| {name} | {row['loss']:.4f} | {row['norm']:.4f} | {off} |")
    logged = results["accumulation"]["trainer"]["8 + 8 + 8 + 3"]
    lines.append(f"| HF Trainer's own log | {logged['loss']:.4f} | {logged['norm']:.4f} | |")
    return "\n".join(lines)


def of_runs(results):
    lines = [
        "| | against | first differing step | accuracy | difference |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["runs"].items():
        other = AGAINST[name]
        accuracy, theirs = row["accuracy"], results["runs"][other]["accuracy"]
        first = "none" if row["first"] is None else f"{row['first']} of {row['steps']}"
        what = (
            ["", "", ""] if name == other else [RUNS[other][0], first, f"{accuracy - theirs:+.3f}"]
        )
        if name == "parity":
            what[0] = what[0] or RUNS["one"][0]
        lines.append(f"| {RUNS[name][0]} | {what[0]} | {what[1]} | {accuracy:.3f} | {what[2]} |")
    return "\n".join(lines)


def draw(results: dict) -> None:
    def bars(axes):
        left = [0.0] * len(results["memory"])
        for piece, colour in zip(PIECES, figures.COLOURS, strict=False):
            widths = [row[piece] for row in results["memory"].values()]
            axes.barh(list(results["memory"]), widths, left=left, color=colour, label=piece)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        peaks = [row["peak"] for row in results["memory"].values()]
        axes.plot(peaks, range(len(peaks)), "k|", color="#999999", markersize=14, label="peak")
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("MB")
        axes.legend(loc="lower right")

    figures.save("myths", bars, size=(7, 3.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="print the measured tables")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.call is not None:
        print(json.dumps(globals()[asked.call[0]](**json.loads(asked.call[1]))))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not asked.tables:
        results |= measure(asked.part, asked.quick)
        if not asked.quick:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            draw(results)
    print("\n\n".join(tables(results)))


if __name__ == "__main__":
    main()
