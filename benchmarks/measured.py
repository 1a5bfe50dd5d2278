"""One measured process: a function of this file, its settings as JSON, one JSON object on the last line.

    python benchmarks/measured.py trainer '{"model": ..., "train": ..., "steps": 12, ...}'

`compare.py` starts these, each in a fresh process, in turn. The peers are written as their documentation
shows them, and nothing about them is slowed down; every process does the same work on the same data with
the same hyper-parameters. Settings: model, train, steps, batch, accumulation, dtype, max_length, targets.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

# Steps at the start that are not timed: allocations, kernels chosen at first use.
WARM_UP = 2
LEARNING_RATE = 1e-3
R, ALPHA, DROPOUT = 8, 16, 0.1


def clocks():
    """Seconds on the wall, and of all this process's threads on their cores."""
    return time.perf_counter(), time.process_time()


def per_step(times):
    """Both clocks' seconds of a step, from their times between steps."""
    names = ("seconds_per_step", "core_seconds_per_step")
    steps = len(times) - 1
    return {n: (times[-1][i] - times[0][i]) / steps for i, n in enumerate(names)}


def minilora(
    model, train, steps, batch, accumulation, dtype, max_length, targets, device="cpu", **flags
):
    """`python -m minilora.train`, called as a library."""
    from minilora.fine_tuning import run_fine_tuning

    asked_at = []

    def should_stop():  # asked before each step
        asked_at.append(clocks())
        return False

    with tempfile.TemporaryDirectory() as directory:
        arguments = {
            "model_name_or_path": model, "train_file": train, "max_length": max_length, "max_steps": steps,
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
            "learning_rate": LEARNING_RATE, "dtype": dtype, "device": device, "save_strategy": "no",
            "output_dir": f"{directory}/out", **flags,
        }  # fmt: skip
        lora = {"r": R, "lora_alpha": ALPHA, "lora_dropout": DROPOUT, "target_modules": targets}
        run_fine_tuning(arguments, lora, should_stop)
    # The last step's end is not seen; the ones between two questions are.
    return per_step(asked_at[WARM_UP:])


def trainer(
    model,
    train,
    steps,
    batch,
    accumulation,
    dtype,
    max_length,
    targets,
    grouped=False,
    device="cpu",
):
    """HF Trainer + PEFT, by default or grouping examples by length."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    ended_at = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **keywords):
            if device != "cpu" and len(ended_at) in (WARM_UP - 1, steps - 1):
                torch.cuda.synchronize()  # at both ends of what is timed
            ended_at.append((*clocks(), time.time()))

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    config = LoraConfig(
        task_type="SEQ_CLS", r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets
    )
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, max_steps=steps, per_device_train_batch_size=batch, learning_rate=LEARNING_RATE,
            gradient_accumulation_steps=accumulation, bf16=dtype == "bfloat16", use_cpu=device == "cpu",
            save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=steps,
            train_sampling_strategy="group_by_length" if grouped else "random",
        )  # fmt: skip
        Trainer(
            get_peft_model(base, config),
            arguments,
            train_dataset=encoded_rows(train, tokenizer, max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[Clock()],
        ).train()
    # Grouping puts the longest examples first; like the warm-up, they are not timed.
    return {**per_step(ended_at[WARM_UP - 1 :]), "first_step_at": ended_at[0][-1]}


def peft_loop(model, train, steps, batch, accumulation, dtype, max_length, targets):
    """PEFT in a bare loop: no Trainer, autocast for bfloat16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    config = LoraConfig(
        task_type="SEQ_CLS", r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets
    )
    adapted = get_peft_model(base, config).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    rows = encoded_rows(train, tokenizer, max_length)
    ended_at = []
    for step in range(steps):
        chosen = [dict(rows[i % len(rows)]) for i in range(step * batch, (step + 1) * batch)]
        labels = torch.tensor([row.pop("label") for row in chosen])
        inputs = tokenizer.pad(chosen, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            adapted(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ended_at.append(time.perf_counter())
    return {"seconds_per_step": (ended_at[-1] - ended_at[WARM_UP - 1]) / (steps - WARM_UP)}


def floor(model, train, steps, batch, accumulation, dtype, max_length, targets):
    """The matrix products of the frozen model alone, forward and input gradient, for the tokens that are
    there: what no LoRA training of the whole model on this machine can undercut. The last layer's
    query side is needed at the first token only, and nothing below the first layer's adapters.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    rows = encoded_rows(train, AutoTokenizer.from_pretrained(model), max_length)
    mean_length = sum(len(rows[i]["input_ids"]) for i in range(len(rows))) / len(rows)
    tokens, hidden, inner = round(mean_length * batch), config.hidden_size, config.intermediate_size
    kind = getattr(torch, dtype)

    def product(n, d_in, d_out, forward_only=False):
        weight, x, g = torch.randn(d_out, d_in), torch.randn(n, d_in), torch.randn(n, d_out)
        weight, x, g = weight.to(kind), x.to(kind), g.to(kind)
        forward = lambda: torch.nn.functional.linear(x, weight)  # noqa: E731
        backward = lambda: g @ weight  # noqa: E731
        return [forward] if forward_only else [forward, backward]

    def layer(n, forward_only):
        attention = [product(tokens, hidden, hidden, forward_only) for _ in "kv"]
        attention += [product(n, hidden, hidden, forward_only)]
        rest = [product(n, hidden, hidden), product(n, hidden, inner), product(n, inner, hidden)]
        return [call for calls in attention + rest for call in calls]

    first, middle, last = layer(tokens, True), layer(tokens, False), layer(batch, False)
    calls = first + middle * (config.num_hidden_layers - 2) + last
    ended_at = []
    with torch.no_grad():
        for _ in range(steps):
            for call in calls * accumulation:
                call()
            ended_at.append(time.perf_counter())
    return {"seconds_per_step": (ended_at[-1] - ended_at[WARM_UP - 1]) / (steps - WARM_UP)}


def minilora_inference(model, adapter, texts, batch, dtype, merged=True):
    """Merged, sorted by length, packed: what `python -m minilora.predict` does."""
    from minilora import merge_adapter, open_run, predict_texts

    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    run = open_run(adapter)
    if merged:
        merge_adapter(run.model)
    list(predict_texts(run, lines[:batch], batch))
    start = time.perf_counter()
    count = sum(1 for _ in predict_texts(run, lines, batch))
    return {"per_second": count / (time.perf_counter() - start)}


def peft_inference(model, adapter, texts, batch, dtype, grouped=False):
    """PEFT, unmerged, padded batches in the order of the file, or sorted by length."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    lines = Path(texts).read_text(encoding="utf-8").splitlines()

    def predict(order):
        for start in range(0, len(order), batch):
            chosen = [lines[i] for i in order[start : start + batch]]
            inputs = tokenizer(chosen, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                adapted(**inputs).logits.argmax(-1)

    predict(range(batch))
    start = time.perf_counter()
    order = list(range(len(lines)))
    if grouped:
        order.sort(key=lambda i: len(lines[i]))
    predict(order)
    return {"per_second": len(lines) / (time.perf_counter() - start)}


class EncodedRows:
    """`text<TAB>label` lines, tokenised once: a map-style dataset for Trainer."""

    def __init__(self, encoded, labels):
        self.encoded, self.labels = encoded, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {k: v[index] for k, v in self.encoded.items()} | {"label": self.labels[index]}


def encoded_rows(path, tokenizer, max_length):
    """The rows of a headerless tsv."""
    fields = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()]
    names = sorted({row[1] for row in fields})
    encoded = tokenizer([row[0] for row in fields], truncation=True, max_length=max_length)
    return EncodedRows(encoded, [names.index(row[1]) for row in fields])


def main() -> None:
    function = globals()[sys.argv[1]]
    result = function(**json.loads(sys.argv[2]))
    # Linux counts kilobytes.
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps(result))


if __name__ == "__main__":
    main()
