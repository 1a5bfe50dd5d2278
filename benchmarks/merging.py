"""What merging rounds: a trained MiniLM, merged and unmerged, in float32 and bfloat16, on its validation sentences.

    python benchmarks/merging.py             # trains for a few steps on the packaged sentences, then measures
    python benchmarks/merging.py --tables    # prints what docs/08_merging.md shows, without measuring

Writes docs/figures/merging.json.
"""

import argparse
import copy
import json
import platform
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "docs" / "figures" / "merging.json"
SEED = 42
STEPS = 60
REFERENCE = "float32, unmerged"


def tables(results: dict) -> list[str]:
    lines = [
        "| model | W' is off by, of the update | logits off by, of their spread | other labels | accuracy |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        update = "" if row["update"] is None else f"{row['update']:.2g}"
        logits = "" if name == REFERENCE else f"{row['logits']:.2g}"
        labels = f"{row['other_labels']} of {results['sentences']}"
        lines.append(f"| {name} | {update} | {logits} | {labels} | {row['accuracy']:.3f} |")
    return ["\n".join(lines) + "\n"]


def measure(machine: str) -> dict:
    import torch
    import transformers

    from minilora import TrainConfig, fine_tune, load_adapter, merge_and_unload, open_run
    from minilora.bert.splits import SENTENCES
    from minilora.trained.opened import load_base, read_record

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        # Named, so that the run does not evaluate as the packaged one does.
        train = TrainConfig(
            train_file=str(SENTENCES / "train.tsv"),
            output_dir=str(out),
            max_steps=STEPS,
            learning_rate=3e-3,
            seed=SEED,
            device="cpu",
        )
        fine_tune(train)
        tokenizer = open_run(out).tokenizer
        adapter, record = read_record(out)
        base = load_base(adapter, record)[0].eval()
        lines = (SENTENCES / "validation.tsv").read_text().splitlines()
        rows = [line.split("\t") for line in lines[1:]]
        header = lines[0].split("\t")
        texts = [row[header.index("text")] for row in rows]
        wanted = [record.labels.index(row[header.index("label")]) for row in rows]

        @torch.no_grad()
        def logits_of(model) -> torch.Tensor:
            found = []
            for start in range(0, len(texts), 32):
                batch = tokenizer(
                    texts[start : start + 32], padding=True, truncation=True, return_tensors="pt"
                )
                found.append(model(**batch).logits.double())
            return torch.cat(found)

        def adapted(dtype: torch.dtype):
            model = copy.deepcopy(base).to(dtype)
            load_adapter(model, adapter)
            return model

        def targets(model) -> dict:
            return {
                name: (layer.base_layer.weight.detach().double(), layer.adapters["default"].delta_weight().double())
                for name, layer in model.named_modules()
                if type(layer).__name__ == "LoRALinear"
            }  # fmt: skip

        def error_of_update(merged, before: dict) -> float:
            """||W' - (W + update)|| / ||update||, over all adapted layers."""
            wrong = sum(
                (merged.get_submodule(n).weight.double() - W - d).square().sum()
                for n, (W, d) in before.items()
            )
            return (wrong / sum(d.square().sum() for _, d in before.values())).sqrt().item()

        models, updates = {}, {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            models[f"{name}, unmerged"] = model = adapted(dtype)
            before = targets(model)
            models[f"{name}, merged"] = merge_and_unload(adapted(dtype))
            updates[f"{name}, merged"] = error_of_update(models[f"{name}, merged"], before)
        late = "merged in float32, then bfloat16"
        models[late] = copy.deepcopy(models["float32, merged"]).to(torch.bfloat16)
        updates[late] = error_of_update(models[late], targets(models[REFERENCE]))

        reference = logits_of(models[REFERENCE])
        spread = (reference.max() - reference.min()).item()
        found = {}
        for name, model in models.items():
            logits = logits_of(model)
            labels = logits.argmax(1)
            found[name] = {
                "update": updates.get(name),
                "logits": (logits - reference).abs().max().item() / spread,
                "other_labels": (labels != reference.argmax(1)).sum().item(),
                "accuracy": (labels == torch.tensor(wanted)).double().mean().item(),
            }
        return {
            "machine": machine,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "seed": SEED,
            "steps": STEPS,
            "r": record.lora.r,
            "lora_alpha": record.lora.lora_alpha,
            "sentences": len(texts),
            "rows": found,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="print the tables, do not measure")
    parser.add_argument("--machine", default=platform.processor(), help="as the results name it")
    asked = parser.parse_args()
    if not asked.tables:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(asked.machine), indent=2) + "\n")
    print(*tables(json.loads(RESULTS.read_text())), sep="\n")


if __name__ == "__main__":
    main()
