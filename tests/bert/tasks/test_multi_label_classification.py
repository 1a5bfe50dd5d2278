"""Several labels: how they are read, what they cost, how they are scored; the best threshold."""

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from minilora import (
    LoraConfig,
    MiniloraError,
    TrainConfig,
    fine_tune,
    open_run,
    predict_texts,
    write_merged_model,
)
from minilora.bert.metrics import best_threshold
from minilora.bert.tasks import task_class
from tests.conftest import WORDS, examples_of, read_rows, task_of, tiny_classifier

NAME = "multi_label_classification"
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
TOPICS = Path(__file__).parents[3] / "examples" / "data" / "topics.jsonl"


def rows_of(directory, name, text, labelled=True, **arguments):
    path = directory / name
    path.write_text(text)
    config = TrainConfig(task=NAME, **arguments)
    return list(task_class(NAME).read_rows(path, config, labelled))


READ = {
    "a list": ("f.jsonl", '{"text": "x", "labels": ["b", "a"]}\n{"text": "y", "labels": []}', {}),
    "text in json": ("f.json", '[{"text": "x", "labels": "b,a"}, {"text": "y", "labels": ""}]', {}),
    "a field": ("f.csv", 'text,labels\nx,"b, a"\ny,\n', {}),
    "a separator": ("f.tsv", "text\tlabels\nx\tb;a\ny\t\n", {"label_separator": ";"}),
}


@pytest.mark.parametrize(("name", "text", "arguments"), READ.values(), ids=READ)
def test_labels_are_a_list_or_a_field_and_may_be_none(name, text, arguments, tmp_path):
    rows = rows_of(tmp_path, name, text, **arguments)
    assert [row.label for row in rows] == [{"b": 1, "a": 1}, {}]
    assert task_class(NAME).find_labels(rows, "f") == ["a", "b"]


COLUMNS = {
    "csv": ("f.csv", "text,B,other,A\nx,1,7,0.0\ny,0,7,1.0\n", ["B", "A"]),
    "jsonl": (
        "f.jsonl",
        '{"text": "x", "B": true, "A": 0}\n{"text": "y", "B": 0, "A": 1}',
        ["B", "A"],
    ),
    "no header": ("f.tsv", "x\t1\t0\ny\t0\t1\n", ["1", "2"]),
}


@pytest.mark.parametrize(("name", "text", "columns"), COLUMNS.values(), ids=COLUMNS)
def test_each_label_may_have_a_column_of_its_own(name, text, columns, tmp_path):
    rows = rows_of(tmp_path, name, text, label_columns=columns)
    assert [list(row.label.values()) for row in rows] == [[1, 0], [0, 1]]
    assert [row.text for row in rows] == ["x", "y"]
    assert task_class(NAME).find_labels(rows, "f") == sorted(columns)


def test_texts_to_be_predicted_need_no_label_columns(tmp_path):
    rows = rows_of(tmp_path, "f.csv", "text\nx\n", labelled=False, label_columns=["A", "B"])
    assert [(row.text, row.label) for row in rows] == [("x", None)]


BAD = {
    "two separators": ("f.csv", 'text,labels\nx,"a,,b"\n', {}, "line 2: the label '' is empty"),
    "a label twice": ("f.jsonl", '{"text": "x", "labels": ["a", "a"]}', {}, "'a' is .*there twice"),
    "nan": ("f.tsv", "text\tlabels\nx\tnan\n", {}, "line 2: the label 'nan' is"),
    "null": ("f.jsonl", '{"text": "x", "labels": null}', {}, "line 1: the label is None"),
    "a list of lists": ("f.jsonl", '{"text": "x", "labels": [["a"]]}', {}, "line 1: the label is"),
    "not 0 or 1": ("f.csv", "text,A,B\nx,1,0\ny,2,0\n", {"label_columns": ["A", "B"]},
                   "line 3: column 'A' is '2'; a column of --label_columns is 0 or 1"),
    "a column that is lacking in a line": ("f.jsonl", '{"text": "x", "A": 1}\n{"text": "y"}',
                                           {"label_columns": ["A"]}, "line 2: column 'A' is None"),
    "no such column": ("f.jsonl", '{"text": "x", "A": 1}', {"label_columns": ["A", "Z"]},
                       "no column 'Z' .--label_columns.; it has text, A"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "arguments", "message"), BAD.values(), ids=BAD)
def test_what_is_no_label_is_refused_with_its_line(name, text, arguments, message, tmp_path):
    with pytest.raises(MiniloraError, match=message):
        rows_of(tmp_path, name, text, **arguments)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("text,labels\nx,a;b\ny,c\n", {}, "each text has one label, such as 'a;b': give --label_s"),
        ("text,labels\nx,\ny,\n", {}, "no text has a label"),
        ("text,A,B\nx,1,0\n", {"label_columns": ["A", "B"]}, "no text has the label 'B'"),
    ],
)
def test_labels_that_teach_nothing_are_refused(text, arguments, message, tmp_path):
    with pytest.raises(MiniloraError, match=message):
        task_class(NAME).find_labels(rows_of(tmp_path, "f.csv", text, **arguments), "f.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for"),
        ({"class_weights": ["balanced"]}, "class_weights is for sequence_classification, not"),
        ({"threshold": "worst"}, "threshold is 'worst'; it must be a number or best"),
        ({"threshold": 1.5}, "threshold is 1.5; it must be in"),
        ({"threshold": "best", "eval_strategy": "steps"}, "chosen as an epoch ends"),
        ({"label_separator": ""}, "label_separator is empty"),
        ({"label_column": "a", "label_columns": ["b"]}, "both given"),
        ({"task": "regression", "threshold": 0.4}, "threshold is for multi_label_classification"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused_by_name(arguments, message):
    with pytest.raises(MiniloraError, match=message):
        TrainConfig(**{"task": NAME, **arguments})


def test_a_threshold_is_chosen_on_validation_data_or_refused(tmp_path, tiny_model, command):
    path = write_topics(tmp_path / "train.jsonl", 8, seed=1)
    flags = ["--task", NAME, "--train_file", path, "--model_name_or_path", tiny_model]
    result = command("train", *flags, "--threshold", "best", "--output_dir", tmp_path / "out")
    assert result.code == 2 and "give --validation_file" in result.err


def test_labels_are_float32_and_an_unknown_one_is_refused_with_its_line(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = rows_of(tmp_path, "f.csv", 'text,labels\nx,"a,c"\ny,\n')
    found = task_of(NAME, ["a", "b", "c"]).encode(rows, tokenizer, 8, "f")["labels"]
    assert found.tolist() == [[1, 0, 1], [0, 0, 0]] and found.dtype == np.float32
    with pytest.raises(MiniloraError, match="f, line 2: label 'c' does not occur .* a, b"):
        task_of(NAME, ["a", "b"]).encode(rows, tokenizer, 8, "f")


def test_the_loss_is_bitwise_transformers():
    """The same operations as in BertForSequenceClassification.forward."""
    model = tiny_classifier(num_labels=3, problem_type=NAME).eval()
    labels = torch.randint(0, 2, (4, 3)).float()
    expected = model(input_ids=torch.arange(1, 17).reshape(4, 4), labels=labels)
    task = task_of(NAME, ["a", "b", "c"])
    for loss in (task.loss, task.training_loss):
        assert torch.equal(loss(expected.logits, {"labels": labels}), expected.loss)
    assert task.loss_weight({"labels": labels}) == 4


def drawn(count=60, seed=3):
    draw = np.random.default_rng(seed)
    labels = (draw.random((count, 4)) < [0.5, 0.3, 0.1, 0.0]).astype(np.float32)
    logits = (labels * 1.5 - 1 + draw.normal(size=labels.shape)).astype(np.float32)
    logits[:, 3] = -9  # never there and never given
    return logits, labels


@pytest.mark.parametrize("threshold", [0.5, 0.3, "best"])
@pytest.mark.parametrize("sizes", [60, 7], ids=str)
def test_scores_of_batches_as_they_come_are_scikit_learns_of_the_whole(threshold, sizes):
    logits, labels = drawn()
    scorer = task_of(NAME, list("abcd"), threshold=threshold).scorer([], examples_of(60))
    for rows in torch.arange(60).split(sizes):
        of_batch = {"labels": torch.from_numpy(labels[rows]), "example": rows}
        scorer.add(torch.from_numpy(logits[rows]), of_batch)
    found = scorer.metrics()
    given = torch.from_numpy(logits).double().sigmoid().numpy() >= found["threshold"]
    average = {f"f1_{how}": how for how in ("micro", "macro")}
    for name, how in average.items():
        expected = sklearn.metrics.f1_score(labels, given, average=how, zero_division=0.0)
        assert found[name] == pytest.approx(expected, abs=1e-12)
    assert found["accuracy"] == sklearn.metrics.accuracy_score(labels, given)
    assert threshold in ("best", found["threshold"])
    report = sklearn.metrics.classification_report(
        labels, given, target_names=list("abcd"), output_dict=True, zero_division=0.0
    )
    for label, scores in scorer.by_class().items():
        theirs = [report[label][n] for n in ("precision", "recall", "f1-score", "support")]
        assert list(scores.values()) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_higher_micro_f1_than_the_best_one(seed):
    logits, labels = drawn(seed=seed)
    probabilities = np.round(1 / (1 + np.exp(-logits.astype(np.float64))), 2)  # many are equal

    def micro(threshold):
        given = probabilities >= threshold
        return sklearn.metrics.f1_score(labels, given, average="micro", zero_division=0.0)

    best = best_threshold(probabilities, labels)
    tried = {threshold: micro(threshold) for threshold in np.arange(0, 1.01, 0.005)}  # and between
    highest = max(tried.values())
    assert micro(best) == pytest.approx(highest, abs=1e-12)
    above = [f1 for threshold, f1 in tried.items() if threshold > best + 0.006]
    assert all(f1 < highest for f1 in above)  # of several, the highest


def test_the_best_threshold_lies_between_two_probabilities_and_is_a_half_where_there_is_no_label():
    assert best_threshold(np.array([[0.9, 0.2], [0.6, 0.1]]), np.array([[1, 0], [1, 0]])) == 0.4
    assert best_threshold(np.array([[0.2, 0.1]]), np.array([[1, 1]])) == 0.05
    assert best_threshold(np.array([[0.9, 0.2]]), np.zeros((1, 2))) == 0.5


# Whole runs, on labels that are words of the text.
TEXT_LABELS = ["good", "bad", "plot", "cast"]


def write_topics(path, count, seed):
    draw = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = draw.choice(WORDS, draw.integers(3, 12)).tolist()
        lines.append({"text": " ".join(words), "labels": [w for w in TEXT_LABELS if w in words]})
    lines.append({"text": " ".join(TEXT_LABELS), "labels": TEXT_LABELS})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("topics")
    return write_topics(directory / "train.jsonl", 43, 1), write_topics(
        directory / "v.jsonl", 19, 2
    )


def train(tiny_model, files, output_dir, **changes):
    values = {
        "task": NAME, "model_name_or_path": str(tiny_model), "train_file": str(files[0]),
        "validation_file": str(files[1]), "output_dir": str(output_dir), "num_train_epochs": 2,
        "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1,
        "device": "cpu", **changes,
    }  # fmt: skip
    return fine_tune(TrainConfig(**values), LoraConfig(**LORA))


class Topics(torch.utils.data.Dataset):
    def __init__(self, path, tokenizer):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        names = sorted(TEXT_LABELS)
        self.labels = [[float(name in row["labels"]) for name in names] for row in rows]
        self.encoded = tokenizer([row["text"] for row in rows], truncation=True)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {k: v[index] for k, v in self.encoded.items()} | {"labels": self.labels[index]}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_hf_parity_every_number_is_trainers(accumulation, tiny_model, files, tmp_path):
    settings = {"eval_strategy": "epoch", "gradient_accumulation_steps": accumulation}
    arguments = TrainingArguments(
        str(tmp_path / "theirs"), per_device_train_batch_size=8, per_device_eval_batch_size=32,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=3e-3,
        num_train_epochs=2, logging_steps=1, **settings,
    )  # fmt: skip
    set_seed(arguments.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=4, problem_type=NAME
    )
    model = get_peft_model(model, PeftConfig(task_type="SEQ_CLS", **LORA))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = [Topics(path, tokenizer) for path in files]
    collator = DataCollatorWithPadding(tokenizer)
    theirs = Trainer(model, arguments, collator, train_dataset=data[0], eval_dataset=data[1])
    theirs.train()
    ours = train(tiny_model, files, tmp_path / "ours", hf_parity=True, **settings)

    def compared(rows):
        names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
        return [{k: row[k] for k in names if k in row} for row in rows if "train_loss" not in row]

    assert compared(ours.log_history) == compared(theirs.state.log_history)
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.fixture(scope="module")
def chosen(tiny_model, files, tmp_path_factory):
    """A finished run that chose its threshold, with a checkpoint at each step."""
    output_dir = tmp_path_factory.mktemp("chosen") / "out"
    train(tiny_model, files, output_dir, threshold="best", save_strategy="steps", save_steps=1)
    return output_dir


def test_the_chosen_threshold_is_kept_with_the_run_and_used(chosen, files, command):
    last = [row for row in read_rows(chosen) if "eval_threshold" in row][-1]
    assert (
        json.loads((chosen / "run.json").read_text())["result"]["eval_threshold"]
        == (last["eval_threshold"])
    )
    result = command("evaluate", chosen, "--file", files[1])
    assert {name: result.summary()[name] for name in last if name[:5] == "eval_"} == {
        name: value for name, value in last.items() if name[:5] == "eval_"
    }
    assert list(result.summary()["per_class"]) == sorted(TEXT_LABELS)
    assert result.out.splitlines()[0].split() == ["class", "precision", "recall", "f1", "support"]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    found = list(predict_texts(open_run(chosen), [row["text"] for row in rows]))
    for row in found:
        assert list(row) == ["index", "labels", "probabilities"]
        over = [n for n, value in row["probabilities"].items() if value >= last["eval_threshold"]]
        assert row["labels"] == over
    right = [
        sorted(row["labels"]) == sorted(f["labels"]) for row, f in zip(rows, found, strict=True)
    ]
    assert sum(right) / len(right) == last["eval_accuracy"]


def test_a_checkpoint_has_the_threshold_of_the_evaluation_before_it(chosen):
    first = next(row for row in read_rows(chosen) if "eval_threshold" in row)
    assert open_run(chosen / "checkpoint-8").task.threshold == first["eval_threshold"]
    with pytest.raises(MiniloraError, match="records no threshold"):
        open_run(chosen / "checkpoint-2")


@pytest.mark.parametrize("recorded", ["high", 7.0, None])
def test_a_record_of_no_threshold_is_refused(recorded):
    with pytest.raises(MiniloraError, match="records no threshold"):
        task_of(NAME, ["a"], threshold="best").recall({"eval_threshold": recorded})


def test_the_merged_model_is_transformers_own_with_a_sigmoid(chosen, tmp_path):
    write_merged_model([chosen], tmp_path / "merged")
    texts = ["good plot", "the cast was bad"]
    expected = predict_texts(open_run(chosen), texts)
    found = pipeline("text-classification", str(tmp_path / "merged"), device="cpu")(
        texts, top_k=None
    )
    for row, theirs in zip(expected, found, strict=True):
        by_label = {item["label"]: item["score"] for item in theirs}
        assert by_label == pytest.approx(row["probabilities"], rel=1e-4)


def test_the_example_is_read():
    rows = list(task_class(NAME).read_rows(TOPICS, TrainConfig(task=NAME), True))
    assert len(rows) == 64 and {len(row.label) for row in rows} == {0, 1, 2, 3}
    assert len(task_class(NAME).find_labels(rows, "f")) == 7
