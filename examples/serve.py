"""Several adapters over one base, which is in memory once, behind HTTP. Texts that come in while
the model is busy go through it together next, each row by its own adapter.

    python examples/serve.py 8000 tone=OUT_A topic=OUT_B
    curl -d '{"adapter": "tone", "text": "Not bad at all."}' localhost:8000
"""

import json
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from minilora import RunRecord, adapter_names, delete_adapter, load_adapter, open_run

BATCH, BODY = 32, 1_000_000  # at most: texts in a batch, bytes of a request
port, outs = int(sys.argv[1]), dict(pair.split("=", 1) for pair in sys.argv[2:])
records = {name: RunRecord.read(Path(out)) for name, out in outs.items()}
kinds = {(r.arguments.task, r.pairs, r.model_sha256[:64]) for r in records.values()}
if len(kinds) > 1 or min(kinds)[:2] != ("sequence_classification", False):
    raise SystemExit("error: give runs on one base that tell classes of single texts apart")
run = open_run(next(iter(outs.values())))
delete_adapter(run.model, "default")  # it comes again, under its name
for name, out in outs.items():
    load_adapter(run.model, out, name)
waiting, one_thread = deque(), ThreadPoolExecutor(1)
ALLOWED = f"give JSON of at most {BODY} bytes: adapter ({' or '.join(outs)}) and text"


def answer_waiting():
    """All that wait, in one batch. An earlier call may have had them all."""
    if asked := [waiting.popleft() for _ in range(min(len(waiting), BATCH))]:
        names, texts, answers = map(list, zip(*asked, strict=True))
        how = {"max_length": run.max_length, "truncation": True, "padding": True}
        batch = run.tokenizer(texts, **how, return_tensors="pt").to(run.model.device)
        with torch.inference_mode(), adapter_names(run.model, names):
            rows = run.model(**batch).logits.float().softmax(-1).tolist()
        for name, row, answer in zip(names, rows, answers, strict=True):
            found = dict(zip(records[name].labels, row, strict=True))
            answer.set_result({"label": max(found, key=found.get), "probabilities": found})


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds that a caller may be silent

    def do_POST(self):
        try:
            size = min(int(self.headers["Content-Length"]), BODY)
            question = json.loads(self.rfile.read(max(size, 0)))
            name, text = question["adapter"], question["text"]
            _ = outs[name], text.encode()  # a known name, and no half of a character
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            status, reply = 400, {"error": ALLOWED}
        else:
            waiting.append((name, text, answer := Future()))
            one_thread.submit(answer_waiting).result()
            status, reply = 200, answer.result(timeout=0)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode() + b"\n")


with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
    print(f"{', '.join(outs)}: http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
