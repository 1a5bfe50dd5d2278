"""A run as ONNX, in float32 and in int8: size, accuracy and speed beside torch's.

    pip install -c constraints.txt -e ".[onnx]"
    python examples/onnx_export.py OUT dev.tsv shipped

OUT tells classes apart; dev.tsv is labelled as in training; `shipped` is new, and then holds the
merged model and its tokenizer for transformers, model.onnx and model_int8.onnx.
"""

import statistics
import sys
import time

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from transformers import AutoModelForSequenceClassification

from minilora import open_run, write_merged_model
from minilora.trained.predict import rows_of_file

out, dev, shipped = sys.argv[1:]
run = open_run(out, device="cpu")
rows = rows_of_file(run, dev, (), labelled=True)
labels = run.task.encode(rows, run.tokenizer, run.max_length, dev)["labels"]
texts = [row.text if row.pair is None else (row.text, row.pair) for row in rows]
how = {"max_length": run.max_length, "truncation": True, "padding": True, "return_tensors": "pt"}

shipped = write_merged_model([out], shipped)
files = [shipped / name for name in ("model.safetensors", "model.onnx", "model_int8.onnx")]
merged = AutoModelForSequenceClassification.from_pretrained(shipped).eval()
example = dict(run.tokenizer(texts[:2], **how))
free = {"dynamic_shapes": {name: {0: "batch", 1: "length"} for name in example}}
torch.onnx.export(merged, (), files[1], kwargs=example, **free, external_data=False, verbose=False)
quantize_dynamic(files[1], files[2])


def onnx_model(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options)
    return lambda batch: session.run(None, {name: ids.numpy() for name, ids in batch.items()})[0]


def measure(batch_size):
    """By model: logits (N, C), and milliseconds per text, the median over the batches."""
    logits, times = ({name: [] for name in models} for _ in range(2))
    for at in range(0, len(texts), batch_size):
        batch = run.tokenizer(texts[at : at + batch_size], **how)
        for name, model in models.items():
            start = time.perf_counter()
            logits[name].append(model(batch))
            times[name].append(1000 * (time.perf_counter() - start) / len(logits[name][-1]))
    return {name: (np.concatenate(logits[name]), statistics.median(times[name])) for name in models}


plain = torch.inference_mode()(lambda batch: merged(**batch).logits.numpy())
models = {"torch": plain, "ONNX": onnx_model(files[1]), "ONNX, int8": onnx_model(files[2])}
found = [measure(1), measure(32)]
print("| | MB | accuracy | ms per text | by 32: accuracy | ms |\n|---|---|---|---|---|---|")
for name, file in zip(models, files, strict=True):
    cells = [f"| {name} | {file.stat().st_size / 1e6:.1f}"]
    for logits, milliseconds in (each[name] for each in found):
        cells.append(f"{np.mean(logits.argmax(-1) == labels):.3f} | {milliseconds:.1f}")
    print(" | ".join(cells), "|")
apart = max(np.abs(each["ONNX"][0] - each["torch"][0]).max() for each in found)
print(f"\nThe logits of ONNX are within {apart:.0e} of torch's.")
sys.exit(int(apart > 1e-4))
