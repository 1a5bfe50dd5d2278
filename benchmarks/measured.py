"""The contestants, each a function: `compare.py`, `ranks.py` and `gpu.py` call them in turn.

    python benchmarks/measured.py trainer '{"model": ..., "train": ..., "steps": 12, ...}'

runs one in a process of its own and prints one JSON object. The peers are written as their documentation shows
them, and nothing about them is slowed down; all do the same work on the same data with the same hyper-parameters.
Settings: model, train, steps, batch, accumulation, dtype, max_length, targets. What starts with `minilora` imports
no peft, and the peers import no minilora.
"""

import contextlib
import copy
import gc
import io
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
    """Both clocks' seconds of a step, from their times between steps; of too few steps, nothing."""
    names = ("seconds_per_step", "core_seconds_per_step")
    steps = len(times) - 1
    if steps < 1:
        return {}
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
    task="sequence_classification",
    **flags,
):
    """HF Trainer + PEFT, by default or grouping examples by length; flags are TrainingArguments'."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

    ended_at = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **keywords):
            if device != "cpu" and len(ended_at) in (WARM_UP - 1, steps - 1):
                torch.cuda.synchronize()  # at both ends of what is timed
            ended_at.append((*clocks(), time.time()))

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, model_class, collator, task_type, labels = for_trainer(task, train, tokenizer, max_length)
    if grouped:
        lengths = [len(ids) for ids in rows.encoded["input_ids"]]
        rows = torch.utils.data.Subset(rows, grouped_evenly(lengths, batch * accumulation, steps))
    config = LoraConfig(
        task_type=task_type, r=R, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets
    )
    with tempfile.TemporaryDirectory() as directory:
        resumed = flags.pop("resume_from_checkpoint", None)
        arguments = {
            "output_dir": directory, "max_steps": steps, "per_device_train_batch_size": batch,
            "learning_rate": LEARNING_RATE, "gradient_accumulation_steps": accumulation,
            "bf16": dtype == "bfloat16", "use_cpu": device == "cpu", "save_strategy": "no", "report_to": [],
            "disable_tqdm": True, "logging_steps": steps,
            "train_sampling_strategy": "sequential" if grouped else "random", **flags,
        }  # fmt: skip
        Trainer(
            get_peft_model(model_class.from_pretrained(model, num_labels=labels), config),
            TrainingArguments(**arguments),
            train_dataset=rows,
            data_collator=collator,
            callbacks=[Clock()],
        ).train(resume_from_checkpoint=resumed)
    return {**per_step(ended_at[WARM_UP - 1 :]), "first_step_at": ended_at[0][-1]}


def for_trainer(task, train, tokenizer, max_length):
    """What Trainer needs to know of a task: its rows, class of model, collator, PEFT's name, labels."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
    )

    if task == "token_classification":
        rows, tags = tagged_rows(train, tokenizer, max_length)
        collator = DataCollatorForTokenClassification(tokenizer)
        return rows, AutoModelForTokenClassification, collator, "TOKEN_CLS", len(tags)
    rows = encoded_rows(train, tokenizer, max_length)
    collator = DataCollatorWithPadding(tokenizer)
    return rows, AutoModelForSequenceClassification, collator, "SEQ_CLS", 2


def grouped_evenly(lengths, of_step, steps):
    """The examples of `steps` steps of Trainer's `group_by_length`, in its order. It sorts some fifty batches at
    a time, longest first, so that the first few of them are no measure: the timed ones are taken from evenly
    spaced places between the longest and the shortest.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(lengths, of_step)
    sorted_together = max(1, min(len(lengths) // (of_step * 4), 50))  # as that function does it
    timed = steps - WARM_UP
    places = [int((i + 0.5) * sorted_together / timed) for i in range(timed)]
    chosen = places[:WARM_UP] + places
    return [i for place in chosen for i in order[place * of_step : (place + 1) * of_step]]


def library(model, train, steps, batch, max_length, targets):
    """Forward and backward passes of one padded batch through a PEFT model and through ours, in turn, dropout
    included: {name: seconds of each}. Both give the same loss, bit for bit, or it is an error.
    """
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    import minilora

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    lora = {"r": R, "lora_alpha": ALPHA, "lora_dropout": DROPOUT, "target_modules": targets}
    sides = {"minilora": copy.deepcopy(base), "PEFT": base}
    minilora.add_adapter(sides["minilora"], minilora.LoraConfig(task_type="SEQ_CLS", **lora))
    sides["PEFT"] = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **lora))
    rows = encoded_rows(train, tokenizer, max_length)
    chosen = [dict(rows[i % len(rows)]) for i in range(batch)]
    labels = torch.tensor([row.pop("labels") for row in chosen])
    inputs = {**tokenizer.pad(chosen, return_tensors="pt"), "labels": labels}
    seconds, losses = {name: [] for name in sides}, {}
    for step in range(WARM_UP + steps):
        for name in list(sides) if step % 2 else reversed(sides):
            set_seed(step)
            sides[name].train().zero_grad()
            start = time.perf_counter()
            losses[name] = sides[name](**inputs).loss
            losses[name].backward()
            seconds[name].append(time.perf_counter() - start)
        if not torch.equal(losses["minilora"], losses["PEFT"]):
            raise SystemExit(f"minilora and PEFT differ in the loss of step {step}: {losses}")
    return {name: of_side[WARM_UP:] for name, of_side in seconds.items()}


def saves(directory, saves):
    """Saves of a checkpoint, in turn: {name: seconds of each}."""
    from checkpoint import measure

    seconds = measure("MiniLM-L6", directory, saves)["seconds"]
    return {"minilora": seconds["minilora"], "Trainer + PEFT": seconds["trainer"]}


def minilora_inference(adapter, texts, batch, merged=True):
    """Sorted by length, packed: what `python -m minilora.predict` does."""
    from minilora import merge_adapter, open_run, predict_texts

    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    run = open_run(adapter)
    if merged:
        merge_adapter(run.model)
    list(predict_texts(run, lines[:batch], batch))
    start = time.perf_counter()
    count = sum(1 for _ in predict_texts(run, lines, batch))
    return {"per_second": count / (time.perf_counter() - start)}


def peft_inference(model, adapter, texts, batch, merged=True, grouped=False):
    """PEFT, padded batches in the order of the file, or sorted by length."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    if merged:
        adapted = adapted.merge_and_unload()
    lines = Path(texts).read_text(encoding="utf-8").splitlines()

    def predict(order):
        for start in range(0, len(order), batch):
            chosen = [lines[i] for i in order[start : start + batch]]
            inputs = tokenizer(chosen, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                adapted(**inputs).logits.argmax(-1)

    predict(range(min(batch, len(lines))))
    start = time.perf_counter()
    order = list(range(len(lines)))
    if grouped:
        order.sort(key=lambda i: len(lines[i]))
    predict(order)
    return {"per_second": len(lines) / (time.perf_counter() - start)}


class EncodedRows:
    """Examples tokenised once: a map-style dataset for Trainer."""

    def __init__(self, encoded, labels):
        self.encoded, self.labels = encoded, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {k: v[index] for k, v in self.encoded.items()} | {"labels": self.labels[index]}


def encoded_rows(path, tokenizer, max_length):
    """The rows of a headerless tsv, `text<TAB>label`."""
    fields = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()]
    names = sorted({row[1] for row in fields})
    encoded = tokenizer([row[0] for row in fields], truncation=True, max_length=max_length)
    return EncodedRows(encoded, [names.index(row[1]) for row in fields])


def tagged_rows(path, tokenizer, max_length):
    """The rows of a CoNLL file, a word's label at its first sub-token, and the names of the tags."""
    words, tags = sentences(path)
    names = sorted({tag for of_sentence in tags for tag in of_sentence})
    how = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
    encoded = tokenizer(words, **how)
    labels = []
    for place, of_sentence in enumerate(tags):
        row = [-100] * len(encoded["input_ids"][place])
        for word, token in first_tokens(encoded.word_ids(place)).items():
            row[token] = names.index(of_sentence[word])
        labels.append(row)
    return EncodedRows(encoded, labels), names


def sentences(path):
    """The words and the tags of each sentence of a CoNLL file; a line without a tag is none."""
    words, tags = [[]], [[]]
    for line in Path(path).read_text(encoding="utf-8-sig").split("\n"):
        word, _, tag = line.strip().partition("\t")
        if tag:
            words[-1].append(word)
            tags[-1].append(tag)
        elif words[-1]:
            words.append([])
            tags.append([])
    return [w for w in words if w], [t for t in tags if t]


def first_tokens(word_ids):
    """Each word's first sub-token in a tokenised sentence; some characters are no token at all."""
    places = reversed(list(enumerate(word_ids)))
    return {word: place for place, word in places if word is not None}


def measure(name, settings):
    """What a contestant found, without its prints, and the process's peak of memory so far."""
    gc.collect()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = globals()[name](**settings)
    # Linux counts kilobytes.
    return {**found, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]))))
