"""What training wrote, opened again: by whichever directory, with nothing repeated."""

import json
import math
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

import minilora
from minilora import MiniloraError, TrainConfig, fine_tune, open_run
from minilora.lora.adapters import set_fused
from minilora.trained.opened import read_record
from tests.conftest import tiny_config

TEXTS = ["it was good", "so dull and bad", "the long story"]


def logits(run_or_model, tokenizer):
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return run_or_model(**batch).logits


def base(tiny_model):
    return AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)


@pytest.mark.parametrize("part", ["", "checkpoint-3", "checkpoint-6"])
def test_a_run_and_its_checkpoints_tell_all(part, finished_run, tiny_model):
    """The model is the one that PEFT makes of the same files, bitwise."""
    run = open_run(finished_run / part)
    assert run.record.labels == ["negative", "positive"] and run.max_length == 64
    theirs = peft.PeftModel.from_pretrained(base(tiny_model), finished_run / part).eval()
    set_fused(run.model, False)  # PEFT's order of operations
    assert torch.equal(logits(run.model, run.tokenizer), logits(theirs, run.tokenizer))
    assert not run.model.training and run.model.config.id2label == {0: "negative", 1: "positive"}


def test_opening_draws_nothing(finished_run):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    open_run(finished_run)
    assert torch.equal(torch.rand(2), expected)


def test_an_unfinished_run_is_its_newest_checkpoint(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run, tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").unlink()  # the last to be written
    assert read_record(tmp_path / "out")[0] == tmp_path / "out" / "checkpoint-6"
    assert "is not finished: this is checkpoint-6" in capsys.readouterr().err
    for step in (3, 6):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    with pytest.raises(MiniloraError, match="no adapter yet.*--resume_from_checkpoint"):
        open_run(tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(finished_run, tmp_path):
    shutil.copytree(finished_run / "checkpoint-3", tmp_path / "checkpoint-3")
    path = tmp_path / "checkpoint-3" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MiniloraError, match="SHA-256 differs"):
        open_run(tmp_path / "checkpoint-3")


def test_a_base_that_has_moved_is_given_and_checked(finished_run, tiny_model, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(tiny_model, moved)
    expected = open_run(finished_run)
    found = open_run(finished_run, model_name_or_path=str(moved))
    assert torch.equal(
        logits(found.model, found.tokenizer), logits(expected.model, expected.tokenizer)
    )
    shutil.copytree(tiny_model, other)
    torch.manual_seed(9)
    BertModel(tiny_config()).save_pretrained(other)
    with pytest.raises(MiniloraError, match="is an adapter for another base model than .*other"):
        open_run(finished_run, model_name_or_path=str(other))


def test_a_base_that_is_gone_says_so(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    run["arguments"]["model_name_or_path"] = "/gone/away"
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    with pytest.raises(MiniloraError, match="'/gone/away': there is no such directory"):
        open_run(tmp_path / "out")


@pytest.mark.parametrize("part", ["theirs", "checkpoint-2"])
@pytest.mark.parametrize("classes", [1, 3])
def test_an_adapter_of_pefts_or_trainers_needs_no_run_json(classes, part, tiny_model, tmp_path):
    """One output is a regression; other names than LABEL_0, ... are nowhere to be found."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=classes)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    )
    directory = tmp_path / part
    theirs.save_pretrained(directory)
    if part == "checkpoint-2":
        (directory / "training_args.bin").write_bytes(b"never opened")
    run = open_run(directory)
    expected = None if classes == 1 else ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert run.record.labels == expected
    set_fused(run.model, False)
    assert torch.equal(logits(run.model, run.tokenizer), logits(theirs.eval(), run.tokenizer))


def test_labels_of_pefts_adapter_come_from_its_base(finished_run, tmp_path):
    merged = minilora.write_merged_model([finished_run], tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
    assert open_run(tmp_path / "theirs").record.labels == ["negative", "positive"]


def test_a_run_on_top_of_a_merged_adapter_is_opened_on_both(finished_run, sentences, tmp_path):
    config = TrainConfig(
        model_name_or_path=str(finished_run), on_adapter="merge", train_file=str(sentences[0]),
        validation_file=str(sentences[1]), output_dir=str(tmp_path / "out"), max_steps=2,
        learning_rate=1e-2, device="cpu",
    )  # fmt: skip
    result = fine_tune(config)
    scores = minilora.evaluate_file(open_run(tmp_path / "out"), sentences[1])
    assert scores.metrics["eval_loss"] == result.metrics["eval_loss"]


def test_an_adapter_without_a_classifying_head_is_refused(tiny_model, tmp_path):
    model = BertModel.from_pretrained(tiny_model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="FEATURE_EXTRACTION"))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(MiniloraError, match="has no head .classifier, score"):
        open_run(tmp_path)


def test_what_is_no_adapter_is_refused_with_what_it_is(tiny_model, tmp_path):
    with pytest.raises(MiniloraError, match="holds a model and no adapter"):
        open_run(tiny_model)
    with pytest.raises(MiniloraError, match="none of the known kinds: looked for run.json"):
        open_run(tmp_path)
    with pytest.raises(MiniloraError, match="is not there"):
        open_run(tmp_path / "nowhere")


def test_a_device_that_is_not_there_is_refused(finished_run):
    with pytest.raises(MiniloraError, match="device is 'abacus'; it must be cpu, cuda"):
        open_run(finished_run, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(MiniloraError, match="give --device cpu"):
            open_run(finished_run, device="cuda")


def test_the_tokenizer_beside_an_adapter_is_used(finished_run, tiny_model):
    ours = open_run(finished_run).tokenizer
    theirs = AutoTokenizer.from_pretrained(tiny_model)
    for text in (*TEXTS, "", "unheard-of words"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_run_whose_evaluation_is_no_number_is_opened(tiny_model, sentences, tmp_path):
    """JSON has no NaN: null stands for it in run.json and metrics.jsonl."""
    config = TrainConfig(
        model_name_or_path=str(tiny_model), train_file=str(sentences[0]),
        validation_file=str(sentences[1]), max_steps=1, learning_rate=1e30,
        output_dir=str(tmp_path / "out"), eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    assert math.isnan(fine_tune(config).metrics["eval_loss"])
    assert open_run(tmp_path / "out").record.result["eval_loss"] is None
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
