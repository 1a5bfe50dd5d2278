"""Texts as examples: windows of long ones, and what their logits together say."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerLegacy, PreTrainedTokenizerFast

from minilora import MiniloraError, TrainConfig, evaluate_file, fine_tune, open_run, predict_texts
from minilora.bert.dataset import batches_in_order, tokenize
from minilora.bert.forward import Padded
from minilora.bert.rows import Row
from minilora.bert.texts import WholeTexts, encode_texts
from minilora.training.evaluation import evaluate_model
from tests.conftest import WORDS, read_rows, task_of

TASKS = {
    "sequence_classification": lambda words: max(("good", "bad"), key=words.count),
    "regression": lambda words: words.count("good") / len(words),
    "multi_label_classification": lambda words: [w for w in ("good", "plot") if w in words],
}
LENGTH, STRIDE = 12, 3


def rows_of(*texts):
    return [Row(text, None, None, None, line) for line, text in enumerate(texts, start=1)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def test_windows_hold_every_token_of_a_text_and_share_the_stride(tokenizer):
    words = [WORDS[i % len(WORDS)] for i in range(25)]
    rows = rows_of(" ".join(words), "good", "", " ".join(words[:10]), " ".join(words[:11]))
    found = encode_texts(rows, np.arange(5), tokenizer, LENGTH, STRIDE)
    assert found["row"].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 4]
    assert found["labels"].tolist() == found["row"].tolist() and not found["truncated"].any()
    windows = np.split(found["input_ids"], np.cumsum(found["lengths"])[:-1])
    whole = tokenizer(rows[0].text, add_special_tokens=False)["input_ids"]
    for number, window in enumerate(windows[:4]):
        start = number * (LENGTH - 2 - STRIDE)
        inner = whole[start : start + LENGTH - 2]
        assert window.tolist() == [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]


def test_windows_leave_the_tokenizer_as_any_call_does(tokenizer):
    rows, labels = rows_of("good " * 40), np.zeros(1)
    encode_texts(rows, labels, tokenizer, LENGTH, None)
    before = tokenizer.backend_tokenizer.to_str()
    encode_texts(rows, labels, tokenizer, LENGTH, STRIDE)
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("pair", [None, "dull"])
def test_a_text_that_just_fills_its_example_is_not_cut_whatever_the_tokenizer(
    tokenizer, tiny_model, pair
):
    slow = BertTokenizerLegacy(str(tiny_model / "vocab.txt"))
    assert not slow.is_fast
    texts = ["good " * 6, "good " * 7, "good " * 8]
    rows = [row._replace(pair=pair) for row in rows_of(*texts)]
    length = 9 + 2 * (pair is not None)
    for each in (tokenizer, slow):
        found = encode_texts(rows, np.zeros(3), each, length, None)
        assert found["truncated"].tolist() == [False, False, True]
        assert found["lengths"].tolist() == [length - 1, length, length]


def bare_tokenizer(**changes):
    """A tokenizer of words that adds no special token."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, **changes))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")


@pytest.mark.parametrize("stride", [None, STRIDE])
def test_a_text_of_which_no_token_is_left_is_refused_by_its_line(stride):
    with pytest.raises(MiniloraError, match="line 2: the tokenizer .* makes no token of ' '"):
        encode_texts(rows_of("good", " "), np.zeros(2), bare_tokenizer(), LENGTH, stride)
    found = encode_texts(rows_of("good", "bad"), np.zeros(2), bare_tokenizer(), LENGTH, stride)
    assert found["lengths"].tolist() == [1, 1]


@pytest.mark.parametrize("stride", [None, STRIDE])
def test_a_word_that_a_tokenizer_cannot_take_is_our_own_error(stride):
    """Of one that has no token for what it does not know."""
    tokenizer = bare_tokenizer(unk_token="?")
    with pytest.raises(MiniloraError, match=r"the tokenizer .* fails: .*Missing \[UNK\]"):
        encode_texts(rows_of("strange"), np.zeros(1), tokenizer, LENGTH, stride)


def test_what_has_no_windows_is_refused_by_name(tokenizer):
    with pytest.raises(MiniloraError, match="stride is 10: it must be below 10"):
        encode_texts(rows_of("good"), np.zeros(1), tokenizer, LENGTH, LENGTH - 2)
    pairs = [Row("good", "bad", None, None, 1)]
    with pytest.raises(MiniloraError, match="stride is 3: windows are of single texts"):
        encode_texts(pairs, np.zeros(1), tokenizer, LENGTH, STRIDE)

    class Slow:
        is_fast = False

        def num_special_tokens_to_add(self):
            return 2

    with pytest.raises(MiniloraError, match="Slow does not tell where .* a fast tokenizer"):
        encode_texts(rows_of("good"), np.zeros(1), Slow(), LENGTH, STRIDE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hf_parity": True}, "hf_parity needs stride None"), ({"stride": -1}, "stride is -1")],
)
def test_a_stride_that_means_nothing_is_refused(settings, message):
    with pytest.raises(MiniloraError, match=message):
        TrainConfig(**{"stride": 3, **settings})


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_text_is_scored_once_its_last_window_has_come_by_their_mean(size):
    row, logits = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3]), torch.randn(9, 2)
    labels, whole, found = torch.from_numpy(row), WholeTexts(row), []
    for part in torch.arange(9).split(size):
        found.append(whole(logits[part], {"labels": labels[part], "example": part}))
    means = torch.cat([logits for logits, _ in found])
    expected = torch.stack([logits[row == text].mean(dim=0) for text in range(4)])
    torch.testing.assert_close(means, expected)
    assert torch.cat([batch["labels"] for _, batch in found]).tolist() == [0, 1, 2, 3]


def write(path, task, count, seed):
    draw, label_of = np.random.default_rng(seed), TASKS[task]
    texts = [draw.choice(WORDS, draw.integers(3, 50)).tolist() for _ in range(count)]
    rows = [{"text": " ".join(words), "label": label_of(words)} for words in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module", params=TASKS)
def run(request, tiny_model, tmp_path_factory):
    """(task, its validation file, arguments, the directory of a run with a checkpoint at each
    step).
    """
    task, directory = request.param, tmp_path_factory.mktemp(request.param)
    extra = {"threshold": "best"} if task.startswith("multi") else {}
    extra = {"class_weights": ["balanced"]} if task.startswith("sequence") else extra
    arguments = {
        "task": task, "model_name_or_path": str(tiny_model), "max_length": LENGTH,
        "train_file": str(write(directory / "train.jsonl", task, 24, 1)), "stride": STRIDE,
        "validation_file": str(write(directory / "validation.jsonl", task, 11, 2)),
        "max_steps": 6, "num_train_epochs": 1, "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 5, "learning_rate": 3e-3,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "device": "cpu", **extra,
    }  # fmt: skip
    fine_tune(TrainConfig(**arguments, output_dir=str(directory / "out")))
    return task, directory / "validation.jsonl", arguments, directory / "out"


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(step, run, tmp_path):
    *_, out = run
    checkpoint = str(out / f"checkpoint-{step}")
    fine_tune(TrainConfig(resume_from_checkpoint=checkpoint, output_dir=str(tmp_path / "on")))
    assert read_rows(tmp_path / "on") == read_rows(out)
    name = "adapter_model.safetensors"
    assert (tmp_path / "on" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("changed", [{"stride": 4}, {"class_weights": ["good=2"]}], ids=str)
def test_a_resume_cannot_change_them(changed, run):
    task, _, _, out = run
    if "stride" in changed or task.startswith("sequence"):
        with pytest.raises(MiniloraError, match=f"cannot change {next(iter(changed))}"):
            fine_tune(TrainConfig(resume_from_checkpoint=str(out), **changed))


def test_evaluation_counts_texts_and_gives_bitwise_trainings_numbers(run, command):
    task, file, _, out = run
    result = command("evaluate", out, "--file", file)
    assert "11 texts are " in result.err and "examples of at most 12 tokens" in result.err
    last = [row for row in read_rows(out) if "eval_loss" in row][-1]
    found = {name: value for name, value in result.summary().items() if name in last}
    assert found == {name: last[name] for name in found} and "eval_loss" in found
    if task == "sequence_classification":
        assert sum(row["support"] for row in result.summary()["per_class"].values()) == 11


def test_a_text_is_predicted_by_the_mean_of_its_windows(run):
    """Computed here one window at a time, by the model's own forward."""
    task, file, _, out = run
    opened = open_run(out)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    found = list(predict_texts(opened, texts))
    assert len(found) == len(texts)
    for text, row in zip(texts, found, strict=True):
        ids = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
        step = LENGTH - 2 - STRIDE
        starts = range(0, max(1, len(ids) - STRIDE), step)
        special = opened.tokenizer.cls_token_id, opened.tokenizer.sep_token_id
        windows = [[special[0], *ids[s : s + LENGTH - 2], special[1]] for s in starts]
        with torch.no_grad():
            logits = [opened.model(torch.tensor([window])).logits[0] for window in windows]
        mean = torch.stack(logits).mean(dim=0)
        if task == "regression":
            assert row["score"] == pytest.approx(mean.item(), abs=1e-5)
        else:
            expected = mean.softmax(-1) if task.startswith("seq") else mean.sigmoid()
            assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_packed_windows_are_padded_ones(run):
    task, file, _, out = run
    packed = open_run(out)
    metrics = evaluate_file(packed, file).metrics
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["arguments"]["batching"] == "packed"
    read = task_of(task, packed.task.labels).read_rows
    rows = list(read(file, packed.record.arguments, True))
    examples = tokenize(rows, packed.task, packed.tokenizer, LENGTH, "f")
    padded = Padded(packed.model, packed.tokenizer.pad_token_id)
    batches = batches_in_order(examples, 5, padded.collate, packed.model.device, "")
    scorer = packed.task.scorer(rows, examples)
    found = evaluate_model(padded, packed.task, False, batches, scorer, "eval")
    for name in {"eval_loss", "eval_f1", "eval_f1_micro", "eval_mse"} & found.keys():
        assert found[name] == pytest.approx(metrics[name], rel=1e-5)


def test_five_thousand_words_are_predicted(run):
    *_, out = run
    assert len(list(predict_texts(open_run(out), ["good plot " * 2500, "bad"]))) == 2
