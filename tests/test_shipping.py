"""The examples that ship an adapter: each is run as docs/shipping.md says."""

import base64
import json
import os
import runpy
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minilora import LoraConfig, TrainConfig, fine_tune, open_run, predict_texts

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = ["the film was good", "awful", "a dull plot but great cast", "", "we loved it so " * 30]


@pytest.fixture(scope="module")
def other_run(tmp_path_factory, tiny_model, sentences) -> Path:
    """A run on the base of `finished_run`, with other names for the labels."""
    directory = tmp_path_factory.mktemp("other")
    text = sentences[0].read_text()
    named = text.replace("\tpositive", "\tyes").replace("\tnegative", "\tno")
    (directory / "train.tsv").write_text(named)
    config = TrainConfig(
        model_name_or_path=str(tiny_model),
        train_file=str(directory / "train.tsv"),
        output_dir=str(directory / "out"),
        max_steps=3,
        learning_rate=2e-2,
        seed=7,
        device="cpu",
    )
    fine_tune(config, LoraConfig(r=2, target_modules=["query", "value"]))
    return directory / "out"


@pytest.fixture(scope="module")
def address(finished_run, other_run):
    """Of a running examples/serve.py with the adapters "first" and "other"."""
    adapters = [f"first={finished_run}", f"other={other_run}"]
    command = [sys.executable, str(EXAMPLES / "serve.py"), "0", *adapters]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[-1]
        process.terminate()


def ask(address: str, body: bytes) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, body, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_callers_at_the_same_time_get_what_predict_texts_gives(address, finished_run, other_run):
    runs = {"first": finished_run, "other": other_run}
    questions = [{"adapter": name, "text": text} for text in TEXTS for name in runs] * 4
    bodies = [json.dumps(question).encode() for question in questions]
    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda body: ask(address, body), bodies))
    expected = {
        (name, text): row
        for name, out in runs.items()
        for text, row in zip(TEXTS, predict_texts(open_run(out), TEXTS), strict=True)
    }
    for question, (status, told) in zip(questions, answers, strict=True):
        row = expected[question["adapter"], question["text"]]
        answer = json.loads(told)
        assert (status, answer["label"]) == (200, row["label"])
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    # Neither is the other under another name.
    assert expected["other", TEXTS[0]]["label"] in ("yes", "no")
    first, other = (max(expected[name, TEXTS[0]]["probabilities"].values()) for name in runs)
    assert first != pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"good",
        b"[]",
        b"null",
        b'{"text": "good"}',
        b'{"adapter": "first"}',
        b'{"adapter": "third", "text": "good"}',
        b'{"adapter": ["first"], "text": "good"}',
        b'{"adapter": "first", "text": 5}',
        b'{"adapter": "first", "text": "\\ud83d"}',
        b'{"adapter": "first", "text": "\xff"}',
        b"[" * 100_000,
        b'{"adapter": "first", "text": "' + b"good " * 200_000 + b'"}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bad_input_gets_400_and_one_line(address, body):
    status, told = ask(address, body)
    assert status == 400 and told.count("\n") == 1
    assert "adapter (first or other) and text" in json.loads(told)["error"]


def load_service(monkeypatch, *adapters: str) -> dict:
    """The names of examples/serve.py, which listens to nobody."""
    monkeypatch.setattr(sys, "argv", ["serve.py", "0", *adapters])
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda server: None)
    return runpy.run_path(str(EXAMPLES / "serve.py"))


def test_all_that_wait_are_one_batch(monkeypatch, finished_run, other_run):
    service = load_service(monkeypatch, f"first={finished_run}", f"other={other_run}")
    batches = []
    service["run"].model.register_forward_pre_hook(
        lambda model, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers = [Future() for _ in range(33)]
    for answer, name in zip(answers, ["first", "other"] * 17, strict=False):
        service["waiting"].append((name, "good", answer))
    for _ in answers:
        service["answer_waiting"]()
    assert batches == [32, 1] and all(answer.done() for answer in answers)


def test_adapters_of_another_base_or_task_are_refused(monkeypatch, tmp_path, finished_run):
    record = json.loads((finished_run / "run.json").read_text())
    pairs = {"model_sha256": "0" * 64}, {"pairs": True}
    for change in pairs:
        changed = tmp_path / next(iter(change))
        shutil.copytree(finished_run, changed)
        (changed / "run.json").write_text(json.dumps(record | change))
        with pytest.raises(SystemExit, match="one base"):
            load_service(monkeypatch, f"first={finished_run}", f"other={changed}")


@pytest.mark.slow
def test_onnx_has_torchs_logits_and_the_table_of_the_docs(tmp_path, finished_run, sentences):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the [onnx] extra")
    shipped = tmp_path / "shipped"
    command = [sys.executable, EXAMPLES / "onnx_export.py", finished_run, sentences[1], shipped]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (EXAMPLES.parent / "docs" / "shipping.md").read_text()
    header, rule, *rows, _, verdict = done.stdout.splitlines()
    assert f"{header}\n{rule}\n| torch | " in page
    assert [row.split(" | ")[0] for row in rows] == ["| torch", "| ONNX", "| ONNX, int8"]
    assert verdict.startswith("The logits of ONNX are within ")
    # Batches and lengths of all sizes, with padding and without.
    model = AutoModelForSequenceClassification.from_pretrained(shipped).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    session = onnxruntime.InferenceSession(shipped / "model.onnx")
    for texts in (TEXTS, TEXTS[:1], TEXTS[-1:], TEXTS * 9):
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        (found,) = session.run(None, {name: ids.numpy() for name, ids in batch.items()})
        with torch.no_grad():
            assert torch.allclose(torch.tensor(found), model(**batch).logits, rtol=0, atol=1e-4)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; what was committed is in `server.files`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        place = f"http://{self.headers['Host']}/me/mine"
        reply: dict = {"url": place, "commitUrl": f"{place}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            as_it_is = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            reply["files"] = [{**file, **as_it_is} for file in json.loads(body)["files"]]
        elif "/commit/" in self.path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    self.server.files[row["value"]["path"]] = content
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    do_GET = do_POST

    def log_message(self, *_):
        pass


def upload(out: Path, home: Path, *flags: str) -> tuple[subprocess.CompletedProcess, dict]:
    """`examples/upload.sh OUT me/mine`, with the real `hf`, to a hub on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        hub.files = {}
        Thread(target=hub.serve_forever, daemon=True).start()
        settings = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_TOKEN": "none",
        }
        command = ["bash", str(EXAMPLES / "upload.sh"), str(out), "me/mine", *flags]
        how = {"capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(command, env={**os.environ, **settings}, **how)
        hub.shutdown()
        return done, hub.files


def test_what_is_uploaded_is_the_run_without_its_checkpoints(tmp_path, finished_run, tiny_model):
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    config = out / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_model), "someone/tiny-bert"))
    done, files = upload(out, tmp_path / "home", "--private")
    assert done.returncode == 0, done.stderr
    kept = {path.name for path in out.iterdir() if path.is_file()} - {".minilora.lock"}
    assert files.keys() == kept > {"adapter_model.safetensors", "README.md", "tokenizer.json"}
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in files.items():
        (arrived / name).write_bytes(content)
    ours, theirs = (list(predict_texts(open_run(path), TEXTS)) for path in (out, arrived))
    assert ours == theirs and ours[0]["label"] in ("negative", "positive")
    _, files = upload(out, tmp_path / "home", "--exclude", "run.json")
    assert files.keys() == kept - {"run.json"}


def test_an_adapter_whose_base_nobody_else_has_is_not_uploaded(tmp_path, finished_run):
    done, files = upload(finished_run, tmp_path)
    assert (done.returncode, files) == (2, {})
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
