"""On a GPU, too, a resumed run is the uninterrupted run, bit for bit."""

import subprocess

import pytest
import torch

from minilora import TrainConfig, fine_tune
from minilora.fine_tuning import run_fine_tuning
from minilora.training import checkpoint as checkpoint_room
from minilora.training.checkpoint import read_checkpoint
from minilora.training.record import RunRecord
from tests.conftest import write_sentences
from tests.cuda import needs_cuda
from tests.cuda.test_training import start_scaling_at
from tests.training.test_resume import arguments, assert_same_run, command, stop_at

pytestmark = needs_cuda

FAST, AGAIN = {"dropout": "fast"}, {"gradient_checkpointing": True}
MODES = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    FAST,
    {**FAST, "dtype": "float16"},
    AGAIN,
    {**AGAIN, "dtype": "bfloat16"},
    {**AGAIN, **FAST},
    {"batching": "padded"},
    {"batching": "padded", "dtype": "bfloat16"},
    {"batching": "padded", "dtype": "float16", **AGAIN},
    {"hf_parity": True},
    {"gradient_accumulation_steps": 4},
]


@pytest.mark.parametrize(
    "mode", MODES, ids=lambda mode: ", ".join(f"{k} {v}" for k, v in mode.items()) or "default"
)
def test_a_resume_is_exact_in_every_mode(mode, tmp_path, tiny_model, sentences):
    values = arguments(tiny_model, sentences, save_steps=1000, device="cuda", **mode)
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    stop_at(3, values, tmp_path / "run")
    fine_tune(TrainConfig(resume_from_checkpoint=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_resume_amid_overflows_of_float16_is_exact(tmp_path, monkeypatch, tiny_model, sentences):
    start_scaling_at(2.0**24, monkeypatch)
    test_a_resume_is_exact_in_every_mode({"dtype": "float16"}, tmp_path, tiny_model, sentences)


def test_a_resume_is_exact_for_long_texts(tmp_path, tiny_model):
    """Longer than one block of an attention kernel's keys. Padded batches are not exact there:
    torch's kernels add the gradients of such blocks up in the order in which they are ready.
    """
    from transformers import AutoTokenizer, BertModel, set_seed

    from tests.conftest import tiny_config

    set_seed(1)
    BertModel(tiny_config(max_position_embeddings=512)).save_pretrained(tmp_path / "long")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(tmp_path / "long")
    short = write_sentences(tmp_path / "short.tsv", 60 * 24, seed=3).read_text().splitlines()[1:]
    lines = ["text\tlabel"]
    for start in range(0, len(short), 60):
        count = 20 + start // 60 * 2
        texts, labels = zip(*(s.split("\t") for s in short[start : start + count]), strict=True)
        lines.append(f"{' '.join(texts)}\t{labels[0]}")
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    files = (tmp_path / "train.tsv", tmp_path / "train.tsv")
    test_a_resume_is_exact_in_every_mode({}, tmp_path, tmp_path / "long", files)


def test_another_process_resumes_to_the_same_bits(tmp_path, tiny_model, sentences):
    values = arguments(tiny_model, sentences, save_steps=1000, device="cuda")
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    stop_at(5, values, tmp_path / "run")
    flags = command({"resume_from_checkpoint": tmp_path / "run"})
    subprocess.run(flags, check=True, capture_output=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def cuda_generator(stored):
    stored.parts["rng_state.pth"]["cuda"] = torch.Generator("cuda").manual_seed(1).get_state()


def cuda_generator_is_absent(stored):
    del stored.parts["rng_state.pth"]["cuda"]


def masks(stored):
    del stored.parts["rng_state.pth"]["mask_stream"]


def scale(stored):
    stored.parts["scaler.pt"]["scale"] = 2.0**40


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        (cuda_generator, {}),
        (cuda_generator_is_absent, {}),
        (masks, FAST),
        (scale, {"dtype": "float16"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_any_one_part_the_resume_is_another_run(
    change, mode, tmp_path, monkeypatch, tiny_model, sentences
):
    """Negative control."""

    def read_and_change(path):
        stored = read_checkpoint(path)
        change(stored)
        return stored

    monkeypatch.setattr(checkpoint_room, "read_checkpoint", read_and_change)
    with pytest.raises(AssertionError):
        test_a_resume_is_exact_in_every_mode(mode, tmp_path, tiny_model, sentences)


def test_a_generators_state_of_another_size_is_refused(
    tmp_path, monkeypatch, tiny_model, sentences
):
    """Before anything of the run is changed, and in one line."""
    from minilora import MiniloraError
    from minilora.training.rng import check_rng_state, rng_state
    from tests.conftest import tiny_classifier

    state = rng_state(tiny_classifier())
    for wrong in (torch.zeros(3, dtype=torch.uint8), torch.zeros(16)):
        with pytest.raises(MiniloraError, match="holds no generators' states"):
            check_rng_state({**state, "cuda": wrong}, tmp_path)


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_device_and_says_so(
    first, second, tmp_path, capsys, tiny_model, sentences
):
    """Our masks and the order of examples are no device's: the run is the same to rounding."""
    values = arguments(tiny_model, sentences, save_steps=1000, device=first, dropout="fast")
    fine_tune(TrainConfig(**values, output_dir=str(tmp_path / "whole")))
    stop_at(5, values, tmp_path / "run")
    assert "bit-exact" not in capsys.readouterr().err
    resumed = {"resume_from_checkpoint": str(tmp_path / "run"), "device": second}
    rows = run_fine_tuning(resumed, {}, lambda: False).log_history
    assert "cuda was" in capsys.readouterr().err
    expected = RunRecord.read(tmp_path / "whole").result
    found = RunRecord.read(tmp_path / "run").result
    assert expected is not None and found is not None
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-2)
    assert len(rows) == 14
