"""Every base that people have: what its files lack is drawn once, trained, saved, found again.

Each family, saved bare, as a masked language model, with its pretraining heads, or with a head for
another number of labels: a run on it, its resume, and what a fresh process makes of it.
"""

import dataclasses
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from minilora import LoraConfig, MiniloraError, TrainConfig, evaluate_file, fine_tune, open_run
from minilora.fine_tuning import run_fine_tuning
from minilora.trained.compare import compare_directories

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 66, "pad_token_id": 0, "embedding_size": 16,
}  # fmt: skip
OF_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
FAMILIES = {
    "bert": {}, "roberta": {}, "xlm-roberta": {}, "camembert": {}, "electra": {},
    "distilbert": OF_DISTILBERT, "albert": {}, "mpnet": {}, "deberta-v2": {},
    "modernbert": {"reference_compile": False},
}  # fmt: skip
KINDS = {
    "bare": (AutoModel, {}),
    "masked": (AutoModelForMaskedLM, {}),
    "pretraining": (AutoModelForPreTraining, {}),
    "three labels": (AutoModelForSequenceClassification, {"num_labels": 3}),
}


def base_of(family, kind, tokenizer, directory):
    """A random model of the family, saved as the kind says, beside the tokenizer."""
    auto_class, labels = KINDS[kind]
    changes = {**SMALL, **FAMILIES[family], "vocab_size": len(tokenizer), **labels}
    torch.manual_seed(7)
    auto_class.from_config(AutoConfig.for_model(family, **changes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def run(base, sentences, output_dir, family, **changes):
    train, validation = map(str, sentences)
    config = TrainConfig(
        model_name_or_path=str(base), train_file=train, validation_file=validation, max_steps=4,
        per_device_train_batch_size=8, output_dir=str(output_dir), save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=4, **changes,
    )  # fmt: skip
    return fine_tune(config, LoraConfig(r=2))


# What a fresh process finds: scores, probabilities, the merged model's and PEFT's logits.
AFTERWARDS = """
import json, sys
import peft, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from minilora import evaluate_file, open_run, predict_texts, write_merged_model

TEXTS = ["the film was good", "the plot was bad and long", "good"]
for line in sys.stdin:
    base, out, validation, merged = json.loads(line)
    run = open_run(out)
    found = {"metrics": evaluate_file(run, validation).metrics}
    rows = list(predict_texts(run, TEXTS))
    found["probabilities"] = [list(row["probabilities"].values()) for row in rows]
    write_merged_model([out], merged)
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    plain = AutoModelForSequenceClassification.from_pretrained
    # What is drawn here and not replaced by the adapter's would differ from the run's.
    theirs = plain(base, num_labels=2, ignore_mismatched_sizes=True)
    theirs = peft.PeftModel.from_pretrained(theirs, out)
    for name, model in (("merged", plain(merged)), ("peft", theirs)):
        with torch.no_grad():
            found[name] = model.eval()(**batch).logits.softmax(-1).tolist()
    print(json.dumps(found))
"""


def check_family(family, kinds, tiny_model, sentences, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked, results = [], []
    for number, kind in enumerate(kinds):
        base = base_of(family, kind, tokenizer, tmp_path / f"base-{number}")
        whole, resumed = tmp_path / f"whole-{number}", tmp_path / f"resumed-{number}"
        results.append(run(base, sentences, whole, family))
        stop_after_two_steps(base, sentences, resumed, family)
        fine_tune(TrainConfig(resume_from_checkpoint=str(resumed)))
        difference = compare_directories(whole, resumed)
        assert difference["tensors"] == difference["log"] == [], kind
        merged = tmp_path / f"merged-{number}"
        asked.append([str(base), str(whole), str(sentences[1]), str(merged)])
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [sys.executable, "-c", AFTERWARDS], input="\n".join(map(json.dumps, asked)),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    for kind, result, line in zip(kinds, results, process.stdout.splitlines(), strict=True):
        found = json.loads(line)
        for name in ("eval_loss", "eval_accuracy"):
            assert found["metrics"][name] == result.metrics[name], (kind, name)
        expected = torch.tensor(found["probabilities"])
        for name in ("merged", "peft"):
            torch.testing.assert_close(torch.tensor(found[name]), expected, atol=2e-5, rtol=0)


def stop_after_two_steps(base, sentences, output_dir, family):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) > 2

    train, validation = map(str, sentences)
    arguments = {
        "model_name_or_path": str(base), "train_file": train, "validation_file": validation,
        "max_steps": 4, "per_device_train_batch_size": 8, "output_dir": str(output_dir),
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4,
    }  # fmt: skip
    lora = dataclasses.asdict(LoraConfig(r=2))
    assert run_fine_tuning(arguments, lora, should_stop).global_step == 2


def test_a_masked_language_model_and_a_distilbert_are_bases(tiny_model, sentences, tmp_path):
    check_family("bert", ["masked"], tiny_model, sentences, tmp_path / "bert")
    check_family("distilbert", ["bare"], tiny_model, sentences, tmp_path / "distilbert")


def test_an_adapter_without_what_its_base_lacks_is_refused(tiny_model, sentences, tmp_path):
    """PEFT leaves the pooler of a masked language model as it was drawn, and saves it nowhere."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = base_of("bert", "masked", tokenizer, tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "a")
    refusal = r"neither the adapter nor its base model holds bert\.pooler"
    with pytest.raises(MiniloraError, match=refusal):
        open_run(tmp_path / "a")
    for how in ("continue", "merge"):
        with pytest.raises(MiniloraError, match=refusal):
            run(tmp_path / "a", sentences, tmp_path / how, "bert", on_adapter=how)


@pytest.mark.parametrize("how", ["continue", "merge"])
def test_a_run_on_such_an_adapter_goes_on_from_what_it_holds(how, tiny_model, sentences, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = base_of("bert", "masked", tokenizer, tmp_path / "base")
    run(base, sentences, tmp_path / "first", "bert")
    result = run(tmp_path / "first", sentences, tmp_path / "second", "bert", on_adapter=how)
    scores = evaluate_file(open_run(tmp_path / "second"), sentences[1])
    assert scores.metrics["eval_loss"] == result.metrics["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_base_of_every_family(family, tiny_model, sentences, tmp_path):
    kinds = list(KINDS)
    if family == "modernbert":
        kinds.remove("pretraining")  # transformers has no such class of it
    check_family(family, kinds, tiny_model, sentences, tmp_path)
