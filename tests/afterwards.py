"""What a fresh process makes of the runs that stdin names, a line of JSON for each; answers with a
line for each: null, or what is wrong.

    python -m tests.afterwards

The commands evaluate, predict and merge run in forks of it.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from minilora import open_run
from minilora.bert.tasks import task_class
from tests.conftest import Finished
from tests.forked import run_forked

TEXTS = ["the film was good", "the plot was bad and very long", "good story"]
MASKED = ["the film was [MASK]", "the [MASK] was bad and very long", "good [MASK]"]
PAIRS = [("what was good", "the film was good and we loved it"), ("who", "they"), ("so", "it is")]
ATOL = 2e-5


def check(line: dict[str, Any]) -> None:
    """Everything of one run. `line` has its task, base and out, training's files and metrics, and
    scratch, a new directory.
    """
    task, out, scratch = line["task"], line["out"], Path(line["scratch"])
    scratch.mkdir()
    found = done(run_forked("evaluate", out, "--file", line["validation_file"])).summary()
    for name, value in line["metrics"].items():
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second")):
            assert found[name] == value, name
    merged = scratch / "merged"
    done(run_forked("merge", out, "--output_dir", merged))

    expected, midway, *others = logits(task, line["base"], out, merged)
    for name, other in zip(("merged", "PEFT"), others, strict=True):
        torch.testing.assert_close(other, expected, atol=ATOL, rtol=1e-5, msg=f"logits: {name}")
    # The control of what stands above: the same adapter three steps earlier.
    assert (midway - expected).abs().max() > 50 * ATOL, "nothing was learned that would be seen"

    oracle = answers if task == "question_answering" else piped
    ours, theirs = predictions(line, scratch), oracle(task, str(merged))
    wrong = f"predictions: {ours}, not {theirs}"
    assert ours == [pytest.approx(row, abs=1e-4) for row in theirs], wrong


def texts_of(task: str) -> list[str]:
    return MASKED if task == "masked_lm" else TEXTS


def done(finished: Finished) -> Finished:
    assert finished.code == 0, finished.err
    return finished


def logits(task: str, base: str, out: str, merged: Path) -> list[torch.Tensor]:
    """Of the run, of PEFT's with the checkpoint of step 2, of the merged model, of PEFT's."""
    run, auto_class = open_run(out), task_class(task).auto_class
    # A head that is drawn here and not replaced by the adapter's would differ from the run's.
    sizes = {} if task == "masked_lm" else {"num_labels": len(run.task.labels or [""])}
    plain = (
        auto_class.from_pretrained(base, ignore_mismatched_sizes=True, **sizes) for _ in range(2)
    )
    adapters = zip(plain, (f"{out}/checkpoint-2", out), strict=True)
    midway, theirs = (peft.PeftModel.from_pretrained(*each) for each in adapters)
    pairs = task == "question_answering"
    if pairs:  # PEFT's own forward for questions leaves out token_type_ids
        midway, theirs = midway.get_base_model(), theirs.get_base_model()
    texts = list(zip(*PAIRS, strict=True)) if pairs else [texts_of(task)]
    batch = AutoTokenizer.from_pretrained(out)(*map(list, texts), padding=True, return_tensors="pt")
    found = []
    for model in (run.model, midway, auto_class.from_pretrained(merged), theirs):
        with torch.inference_mode():
            of = model.eval()(**batch)
        found.append(torch.stack([of.start_logits, of.end_logits]) if pairs else of.logits)
    return found


def predictions(line: dict[str, Any], scratch: Path) -> list[dict[str, float]]:
    """What predict says of each text, by the name, or the place and the name, of each score."""
    task, given = line["task"], scratch / "given.jsonl"
    if task == "question_answering":
        asked = [{"question": question, "context": context} for question, context in PAIRS]
        given.write_text("\n".join(map(json.dumps, asked)))
        finished = run_forked("predict", line["out"], "--file", given)
    else:
        given.write_text("\n".join(texts_of(task)) + "\n")
        finished = run_forked("predict", line["out"], "-", stdin=str(given))
    *rows, _ = map(json.loads, done(finished).out.splitlines())
    by_task = {
        "regression": lambda row: {"score": row["score"]},
        "token_classification": lambda row: by_place(row["entities"], "label"),
        "question_answering": lambda row: by_place(row["answers"], "answer"),
        "masked_lm": lambda row: {
            f"{number} {one['token']}": one["score"]
            for number, fill in enumerate(row["fills"])
            for one in fill["candidates"]
        },
    }
    return [by_task.get(task, lambda row: row["probabilities"])(row) for row in rows]


def by_place(entities: list[dict[str, Any]], name: str) -> dict[str, float]:
    return {f"{one['start']}-{one['end']} {one[name]}": one["score"] for one in entities}


def piped(task: str, merged: str) -> list[dict[str, float]]:
    """The same of transformers' pipeline over the merged model."""
    tag = task_class(task).pipeline_tag
    strategy = {"aggregation_strategy": "first"} if tag == "token-classification" else {}
    every = {"top_k": None} if tag == "text-classification" else {}
    pipe, found = pipeline(tag, merged, device="cpu", **strategy, **every), []
    for text in texts_of(task):
        rows = pipe(text)
        rows = rows[0] if isinstance(rows[0], list) else rows
        if task == "token_classification":
            found.append(by_place(rows, "entity_group"))
        elif task == "masked_lm":
            found.append({f"0 {row['token_str']}": row["score"] for row in rows})
        elif task == "regression":
            found.append({"score": rows[0]["score"]})
        else:
            found.append({row["label"]: row["score"] for row in rows})
    return found


def answers(task: str, merged: str) -> list[dict[str, float]]:
    """The same of the merged model's logits: transformers 5 has no pipeline for questions."""
    tokenizer, found = AutoTokenizer.from_pretrained(merged), []
    model = task_class(task).auto_class.from_pretrained(merged)
    for question, context in PAIRS:
        batch = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        spans, inside = batch.pop("offset_mapping")[0].tolist(), batch.sequence_ids(0)
        with torch.inference_mode():
            of = model(**batch)
        start, end = of.start_logits[0], of.end_logits[0]
        scores = {
            (spans[i][0], spans[j][1]): start[i] + end[j]
            for i in range(len(spans))
            for j in range(i, len(spans))
            if inside[i] == inside[j] == 1
        }
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:20]
        kept = [*best, (0, 0)]
        shares = torch.stack([*(scores[span] for span in best), start[0] + end[0]]).softmax(-1)
        found.append(
            {f"{i}-{j} {context[i:j]}": s for (i, j), s in zip(kept, shares.tolist(), strict=True)}
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in sys.stdin:
        try:
            check(json.loads(text))
            answer = None
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)
