"""Whatever `--model_name_or_path` names: a base, a merged model, an adapter, a run, checkpoints."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

import minilora
from minilora import MiniloraError
from minilora.fine_tuning import run_fine_tuning
from minilora.trained.directory import inspect_directory
from minilora.training import checkpoint
from minilora.training.record import RunRecord
from tests.conftest import read_rows


def train(tiny_model, sentences, output_dir, lora=None, **changes):
    values = {
        "model_name_or_path": str(tiny_model),
        "train_file": str(sentences[0]),
        "output_dir": str(output_dir),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "device": "cpu",
        **changes,
    }
    return run_fine_tuning(values, lora or {}, lambda: False)


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model, sentences):
    """A finished run to start from."""
    output_dir = tmp_path_factory.mktemp("first") / "out"
    train(tiny_model, sentences, output_dir, {"r": 4, "lora_dropout": 0.0})
    return output_dir


def adapter(directory):
    return load_file(directory / "adapter_model.safetensors")


def logits(model, tokenizer):
    batch = tokenizer(["it was good", "so dull and bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("part", ["", "checkpoint-3"])
def test_an_adapter_is_continued_with_its_own_settings(part, first, tmp_path, sentences, capsys):
    """Zero learning rate: what comes out is bitwise what went in, head included."""
    train(first / part, sentences, tmp_path / "out", learning_rate=0.0)
    before, after = adapter(first), adapter(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert ": continued" in capsys.readouterr().err


def test_an_adapter_of_pefts_is_continued(tmp_path, tiny_model, sentences):
    import peft

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2))
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "theirs")
    train(tmp_path / "theirs", sentences, tmp_path / "out", learning_rate=0.0)
    before, after = adapter(tmp_path / "theirs"), adapter(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_setting_that_contradicts_the_continued_adapter_is_refused(first, tmp_path, sentences):
    with pytest.raises(MiniloraError, match="r: 4 -> 16.*--on_adapter merge"):
        train(first, sentences, tmp_path / "out", {"r": 16})
    train(first, sentences, tmp_path / "agreeing", {"r": 4})


def test_a_merged_adapter_is_the_base_of_a_new_one(first, tmp_path, tiny_model, sentences):
    """With the new adapter at its start, the model answers as the first run's did."""
    train(first, sentences, tmp_path / "out", {"r": 2}, on_adapter="merge", learning_rate=0.0)
    assert adapter(tmp_path / "out")[
        "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    ].shape == (2, 32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    minilora.load_adapter(expected, first)
    found = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    minilora.load_adapter(found, first)
    minilora.merge_and_unload(found)
    minilora.load_adapter(found, tmp_path / "out")
    torch.testing.assert_close(logits(found, tokenizer), logits(expected, tokenizer))


@pytest.fixture(scope="module")
def on_merged(tmp_path_factory, first, sentences):
    """A run on the first one's model, its adapter merged; the first is gone. Not to be changed."""
    place = tmp_path_factory.mktemp("merged")
    shutil.copytree(first, place / "first")
    settings = {"max_steps": 6, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    evaluated = {"validation_file": str(sentences[1])}
    train(place / "first", sentences, place / "out", on_adapter="merge", **settings, **evaluated)
    shutil.rmtree(place / "first")
    return place / "out"


@pytest.fixture
def moved(on_merged, tmp_path):
    """The same, now elsewhere; in the place that its files name there is nothing."""
    shutil.copytree(on_merged, tmp_path / "copy")
    yield on_merged.rename(tmp_path / "moved")
    (tmp_path / "copy").rename(on_merged)


def refused(output_dir) -> str:
    with pytest.raises(MiniloraError) as error:
        run_fine_tuning({"resume_from_checkpoint": str(output_dir)}, {}, lambda: False)
    return str(error.value)


def test_peft_loads_an_adapter_on_a_merged_base_as_it_was_trained(on_merged):
    import peft

    config = json.loads((on_merged / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(on_merged / "base")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(on_merged)
    ours = minilora.open_run(on_merged)
    assert theirs.config.id2label == {0: "negative", 1: "positive"}
    assert torch.equal(logits(theirs, ours.tokenizer), logits(ours.model, ours.tokenizer))


def test_a_merged_base_is_a_model_like_any_other_and_holds_its_own_head(
    on_merged, first, tiny_model
):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    minilora.load_adapter(model, first)
    minilora.merge_and_unload(model)
    kept = AutoModelForSequenceClassification.from_pretrained(on_merged / "base").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert not [path for path in on_merged.iterdir() if path.name.startswith(".tmp-")]


def test_a_resume_on_a_merged_base_is_exact_and_writes_it_no_second_time(on_merged, tmp_path):
    """It needs neither the adapter that was merged nor its base."""
    part = tmp_path / "out"
    shutil.copytree(on_merged, part)
    before = {path: path.stat().st_mtime_ns for path in (part / "base").iterdir()}
    for step in (4, 6):
        shutil.rmtree(part / f"checkpoint-{step}")
    run_fine_tuning({"resume_from_checkpoint": str(part)}, {}, lambda: False)
    assert {path: path.stat().st_mtime_ns for path in (part / "base").iterdir()} == before
    whole, resumed = adapter(on_merged), adapter(part)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert read_rows(part) == read_rows(on_merged)
    assert (part / "README.md").read_text() == (on_merged / "README.md").read_text()


@pytest.mark.parametrize("tensor", ["bert.encoder.layer.1.output.dense.weight", "classifier.bias"])
def test_a_merged_base_that_was_changed_is_refused(on_merged, tmp_path, tensor):
    part, weights = tmp_path / "out", tmp_path / "out" / "base" / "model.safetensors"
    shutil.copytree(on_merged, part)
    for path in part.glob("checkpoint-*"):  # from the first step on, where the head matters, too
        shutil.rmtree(path)
    record = json.loads((part / "run.json").read_text())
    (part / "run.json").write_text(json.dumps({**record, "result": None}))
    tensors = load_file(weights)
    save_file({**tensors, tensor: tensors[tensor] + 1e-6}, weights, metadata={"format": "pt"})
    assert f"not what the run began with: base model or adapter ({part / 'base'} or" in refused(
        part
    )
    weights.write_bytes(weights.read_bytes()[:-9])
    assert f"{part / 'base'}' cannot be loaded" in refused(part)


def test_a_merged_base_that_is_gone_is_written_again_from_the_adapter(first, tmp_path, sentences):
    train(
        first, sentences, tmp_path / "out", on_adapter="merge", max_steps=2, save_strategy="epoch"
    )
    weights = (tmp_path / "out" / "base" / "model.safetensors").read_bytes()
    whole = adapter(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "base")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    run_fine_tuning({"resume_from_checkpoint": str(tmp_path / "out")}, {}, lambda: False)
    assert (tmp_path / "out" / "base" / "model.safetensors").read_bytes() == weights
    again = adapter(tmp_path / "out")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_never_began_leaves_no_merged_base_in_the_way(
    first, tmp_path, sentences, monkeypatch
):
    """Neither an error nor a kill before there is a run.json, and of a resume not either."""
    out, new = tmp_path / "out", tmp_path / "new"
    with pytest.raises(MiniloraError, match="matches nothing"):
        train(first, sentences, out, {"target_modules": ["nothing"]}, on_adapter="merge")
    with monkeypatch.context() as patched:
        patched.setattr(RunRecord, "write", lambda self, output_dir: sys.exit(137))
        with pytest.raises(SystemExit):
            train(first, sentences, out, on_adapter="merge")
    train(first, sentences, out, on_adapter="merge", max_steps=2, save_strategy="steps")
    assert [path.name for path in out.glob(".tmp-*")] == [] and (out / "base").is_dir()
    resume = {"resume_from_checkpoint": str(out), "output_dir": str(new)}
    longer = {**resume, "max_steps": 3, "extend": True}
    with pytest.raises(MiniloraError, match="unlike"), monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_checked_state", refuse)
        run_fine_tuning(longer, {}, lambda: False)
    assert run_fine_tuning(longer, {}, lambda: False).global_step == 3
    assert f'"{new}/base"' in (new / "adapter_config.json").read_text()


def refuse(*_):
    raise MiniloraError("unlike")


def test_a_run_of_an_older_version_which_kept_no_merged_base_is_resumed(first, tmp_path, sentences):
    out = tmp_path / "out"
    train(first, sentences, out, on_adapter="merge", save_strategy="no")
    whole, record = adapter(out), json.loads((out / "run.json").read_text())
    shutil.rmtree(out / "base")
    older = {"model_sha256": record["model_sha256"].split()[0], "result": None}
    (out / "run.json").write_text(json.dumps({**record, **older}))
    run_fine_tuning({"resume_from_checkpoint": str(out)}, {}, lambda: False)
    assert all(torch.equal(tensor, adapter(out)[name]) for name, tensor in whole.items())


def test_a_disk_that_is_full_leaves_no_merged_base_and_the_same_command_works(
    first, tmp_path, sentences, monkeypatch
):
    def full(self, directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(BertTokenizerFast, "save_pretrained", full)
        with pytest.raises(OSError, match="make room"):
            train(first, sentences, tmp_path / "out", on_adapter="merge")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".minilora.lock"]
    assert train(first, sentences, tmp_path / "out", on_adapter="merge").global_step == 3


@pytest.mark.parametrize("part", ["", "checkpoint-6"])
def test_once_moved_the_commands_find_the_merged_base_beside_it(
    moved, part, command, sentences, tmp_path
):
    done = command("evaluate", moved / part, "--file", sentences[1])
    assert done.code == 0, done.err
    assert done.summary()["eval_loss"] == read_rows(moved)[-1]["eval_loss"]
    done = command("predict", moved / part, "--text", "it was good")
    assert done.code == 0, done.err
    done = command("merge", moved / part, "--output_dir", tmp_path / "model")
    assert done.code == 0, done.err
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    run = minilora.open_run(moved / part)
    torch.testing.assert_close(logits(merged, run.tokenizer), logits(run.model, run.tokenizer))


def test_once_moved_peft_loads_it_as_the_card_says(moved):
    import peft

    advice = "Once moved, transformers loads `out/base`, and `PeftModel.from_pretrained` the rest"
    assert advice in (moved / "README.md").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(moved / "base")
    theirs, ours = peft.PeftModel.from_pretrained(base, moved), minilora.open_run(moved)
    assert torch.equal(logits(theirs, ours.tokenizer), logits(ours.model, ours.tokenizer))


def test_a_run_on_a_merged_base_resumes_and_is_continued_where_it_was_moved(
    moved, sentences, tmp_path
):
    shutil.rmtree(moved / "checkpoint-6")
    assert inspect_directory(moved)["resume"]["refuses"] == []
    run_fine_tuning({"resume_from_checkpoint": str(moved)}, {}, lambda: False)
    config = json.loads((moved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved / "base")
    before = adapter(moved)
    train(moved, sentences, tmp_path / "next", learning_rate=0.0)
    assert all(torch.equal(tensor, adapter(tmp_path / "next")[n]) for n, tensor in before.items())


def test_a_continued_run_resumes_bitwise(first, tmp_path, sentences):
    settings = {"max_steps": 6, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    train(first, sentences, tmp_path / "whole", **settings)
    train(first, sentences, tmp_path / "part", **settings)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "part" / f"checkpoint-{step}")
    run_fine_tuning({"resume_from_checkpoint": str(tmp_path / "part")}, {}, lambda: False)
    whole, part = adapter(tmp_path / "whole"), adapter(tmp_path / "part")
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_merged_model_is_a_base_like_any_other(first, tmp_path, tiny_model, sentences, capsys):
    """Saved by transformers, its trained head is kept: nothing is drawn anew."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    minilora.load_adapter(model, first)
    minilora.merge_and_unload(model)
    model.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "merged")
    train(tmp_path / "merged", sentences, tmp_path / "out")
    assert "new: -" in capsys.readouterr().err


def test_trainers_checkpoint_of_a_full_fine_tune_is_a_base(tmp_path, tiny_model, sentences):
    from transformers import Trainer, TrainingArguments

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    arguments = TrainingArguments(str(tmp_path / "full"), report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, processing_class=AutoTokenizer.from_pretrained(tiny_model))
    trainer.save_model(str(tmp_path / "full"))
    assert (tmp_path / "full" / "training_args.bin").exists()
    assert train(tmp_path / "full", sentences, tmp_path / "out").global_step == 3


def test_an_adapter_whose_base_is_gone_says_where_it_was_looked_for(first, tmp_path, sentences):
    shutil.copytree(first, tmp_path / "moved")
    path = tmp_path / "moved" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/gone/away"}))
    with pytest.raises(
        MiniloraError, match="names the base model '/gone/away': .*no such directory"
    ):
        train(tmp_path / "moved", sentences, tmp_path / "out")
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(MiniloraError, match="does not name its base model"):
        train(tmp_path / "moved", sentences, tmp_path / "out")


def test_an_adapter_with_another_number_of_labels_is_refused(first, tmp_path):
    path = tmp_path / "three.tsv"
    path.write_text("text\tlabel\n" + "".join(f"good\t{i % 3}\n" for i in range(12)))
    expected = r"classifier\.weight is a .* of shape \(2, 32\) instead of a .* of shape \(3, 32\)"
    with pytest.raises(MiniloraError, match=expected):
        train(first, (path, path), tmp_path / "out")


def test_lora_config_is_not_needed_to_continue(first, tmp_path, sentences):
    """In the library, too: the adapter directory says it all."""
    from minilora import TrainConfig, fine_tune

    config = TrainConfig(
        model_name_or_path=str(first), train_file=str(sentences[0]), max_steps=1,
        output_dir=str(tmp_path / "out"), device="cpu",
    )  # fmt: skip
    assert fine_tune(config).global_step == 1
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def in_hub_cache(cache, name, directory):
    """Lay `directory` out as the hub's client caches the repository `name`."""
    repository = cache / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("name", ["someone/tiny-bert", "someone/tiny-adapter"])
def test_a_hub_id_of_a_model_or_of_an_adapter_is_taken_from_the_cache(
    name, tmp_path, tiny_model, first, sentences
):
    """The hub's own client reads the cache; nothing is reachable here. The adapter's base is a hub
    id, too.
    """
    adapter_directory = tmp_path / "adapter"
    shutil.copytree(first, adapter_directory, ignore=shutil.ignore_patterns("checkpoint-*"))
    path = adapter_directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "someone/tiny-bert"}))
    in_hub_cache(tmp_path, "someone/tiny-bert", tiny_model)
    in_hub_cache(tmp_path, "someone/tiny-adapter", adapter_directory)

    flags = {"model_name_or_path": name, "train_file": sentences[0], "output_dir": "out"}
    flags |= {"max_steps": 1, "learning_rate": 0, "device": "cpu"}
    command = [sys.executable, "-m", "minilora.train"]
    command += [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"{name} of the hub" in result.stderr
    if name.endswith("adapter"):
        before, after = adapter(first), adapter(tmp_path / "out")
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_adapter_that_changed_since_is_refused_on_a_resume(first, tmp_path, sentences):
    """Whether there is a checkpoint already or it would begin anew from the changed adapter."""
    copy = shutil.copytree(first, tmp_path / "adapter", ignore=shutil.ignore_patterns("check*"))
    arguments = {
        "model_name_or_path": str(copy), "train_file": str(sentences[0]), "max_steps": 2,
        "output_dir": str(tmp_path / "out"), "device": "cpu", "save_strategy": "steps",
    }  # fmt: skip
    run_fine_tuning(arguments, {}, lambda: True)
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MiniloraError, match="base model or adapter"):
        run_fine_tuning({"resume_from_checkpoint": str(tmp_path / "out")}, {}, lambda: False)


@pytest.mark.parametrize("trained", [None, ["word_embeddings"], ["pooler"]], ids=str)
def test_over_a_bfloat16_base_what_is_trained_is_read_as_it_was_saved(
    trained, tmp_path, tiny_model, sentences
):
    """Not rounded on the way: opened, continued and resumed, it has the file's own bits."""
    lora = {"r": 2, **({"modules_to_save": trained} if trained else {})}
    train(tiny_model, sentences, tmp_path / "out", lora, dtype="bfloat16")
    saved = adapter(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    rounded = {name for name, t in saved.items() if not torch.equal(t, t.bfloat16().float())}
    assert any("classifier" in name for name in rounded), "nothing that rounding would change"
    opened = minilora.adapter_state_dict(minilora.open_run(tmp_path / "out").model)
    assert all(torch.equal(opened[name], saved[name]) for name in saved)

    changes = {"dtype": "bfloat16", "learning_rate": 0.0}
    train(tmp_path / "out", sentences, tmp_path / "again", **changes)
    continued = adapter(tmp_path / "again")
    assert all(torch.equal(continued[name], saved[name]) for name in saved)


def test_an_adapter_of_many_targets_is_continued_whichever_way_they_are_listed(
    tmp_path, tiny_model, sentences
):
    """Twenty names or more are shortened when an adapter is added; a file may list them all."""
    import peft
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(tiny_model, num_hidden_layers=10)
    BertModel(config).save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "deep")
    names = [f"encoder.layer.{n}.attention.self.{q}" for n in range(10) for q in ("query", "value")]
    train(tmp_path / "deep", sentences, tmp_path / "out", {"r": 2, "target_modules": names})
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(values["target_modules"]) < 20
    values["target_modules"] = [f"bert.{name}" for name in names]
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(values))
    train(tmp_path / "out", sentences, tmp_path / "again")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "deep", num_labels=2)
    peft.PeftModel.from_pretrained(plain, tmp_path / "again")
