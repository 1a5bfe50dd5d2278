"""A training step of each family, packed against padded, in one process, in turn.

    python benchmarks/families.py --train train.tsv                (--families bert albert, --steps N)

Random models of 6 layers x 384 with the vocabulary of the packaged MiniLM, r=8 on the default targets,
dropouts as the families have them, drawn fast both times; batches of 32 sentences in random order. What is
printed: medians of a step, forward and backward, and the median of the ratios of neighbours.
"""

import argparse
import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from minilora import LoraConfig, add_adapter
from minilora.bert import load
from minilora.bert.dataset import tokenize
from minilora.bert.dropout import MaskStream, use_fast_dropout
from minilora.bert.forward import Packed, Padded, can_pack
from minilora.bert.rows import read_rows
from minilora.bert.tasks import build_task
from minilora.lora.adapters import set_fused

BATCH = 32
SIZES = {
    "num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536,
    "embedding_size": 128, "n_layers": 6, "dim": 384, "n_heads": 12, "hidden_dim": 1536, "vocab_size": 30522,
    "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
OF_VERSION_3 = {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 256, "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
# ModernBERT's gated layer has half the width for the same weights.
FAMILIES = {
    "bert": {}, "distilbert": {}, "albert": {}, "mpnet": {}, "deberta-v2": OF_VERSION_3,
    "modernbert": {"intermediate_size": 1024, "reference_compile": False},
}  # fmt: skip


def step(forward, examples, task, indices):
    start = time.perf_counter()
    batch = forward.collate(examples, indices)
    task.training_loss(forward(batch), batch).backward()
    return time.perf_counter() - start


def measure(family, examples, task, steps):
    """(seconds packed, seconds padded), each (steps,)."""
    set_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForSequenceClassification.from_config(config)
    add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1))
    set_fused(model, True)
    use_fast_dropout(model.train(), MaskStream(0))
    assert can_pack(model)
    forwards = [Padded(copy.deepcopy(model), 0), Packed(model, 0)]
    order = np.random.default_rng(0).permutation(len(examples))
    seconds = []
    for number in range(steps + 2):
        indices = order[number * BATCH : (number + 1) * BATCH]
        turns = forwards if number % 2 else forwards[::-1]
        taken = {type(forward): step(forward, examples, task, indices) for forward in turns}
        seconds.append((taken[Packed], taken[Padded]))
    return np.array(seconds[2:]).T


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    tokenizer = load.load_tokenizer(str(load.packaged_model()), None)
    rows = list(read_rows(Path(arguments.train)))
    task = build_task("sequence_classification", ["0", "1"])
    examples = tokenize(rows, task, tokenizer, 128, arguments.train)
    examples = dataclasses.replace(examples, token_type_ids=None)  # some families have none
    for family in arguments.families:
        packed, padded = measure(family, examples, task, arguments.steps)
        ratios = np.quantile(padded / packed, (0.25, 0.5, 0.75))
        medians = 1000 * np.median(packed), 1000 * np.median(padded)
        print(f"{family:12} packed {medians[0]:5.0f} ms, padded {medians[1]:5.0f} ms, "
              f"ratio {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
