"""The adapter directory: strict reading, atomic and reproducible writing."""

import json
import os
import pickle
import shutil
import stat
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import minilora
from minilora import LoraConfig, MiniloraError
from minilora.lora.peft_files import check_adapter, parse_adapter, read_adapter
from tests.conftest import tiny_classifier

PREFIX = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def saved(tmp_path):
    """An adapter directory with values that are not the initial ones."""
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=4))
    for _, parameter in minilora.trainable_parameters(model):
        parameter.data += 0.1
    minilora.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_refused(directory, message, **arguments):
    """The load fails with one message, and the model is as it was."""
    model = tiny_classifier()
    with pytest.raises(MiniloraError, match=message):
        minilora.load_adapter(model, directory, **arguments)
    plain = tiny_classifier()
    assert not hasattr(model, "minilora_adapters")
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for (_, one), (_, other) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad


def test_the_loaded_keys_are_returned_and_the_adapter_is_frozen(saved):
    model = tiny_classifier()
    keys = minilora.load_adapter(model, saved)
    assert keys == sorted(safetensors.torch.load_file(saved / "adapter_model.safetensors"))
    assert minilora.trainable_parameters(model) == []
    assert keys == sorted(minilora.adapter_state_dict(model))


def test_a_trainable_adapter_can_be_loaded(saved):
    model = tiny_classifier()
    minilora.load_adapter(model, saved, is_trainable=True)
    assert len(minilora.trainable_parameters(model)) == 4 * 2 + 2


def test_loading_draws_nothing_from_the_generator(saved):
    model, before = tiny_classifier(), torch.get_rng_state()
    minilora.load_adapter(model, saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_load_save_is_the_same_bytes(saved, tmp_path):
    model = tiny_classifier()
    minilora.load_adapter(model, saved)
    minilora.save_adapter(model, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_files_do_not_depend_on_the_hash_seed(tmp_path):
    code = (
        "import sys; from tests.conftest import tiny_classifier; import minilora\n"
        "model = tiny_classifier()\n"
        "config = minilora.LoraConfig(target_modules={'query', 'key', 'value'})\n"
        "minilora.add_adapter(model, config)\n"
        "minilora.save_adapter(model, sys.argv[1])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / seed],
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_files_have_the_permissions_the_umask_gives(tmp_path):
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig())
    before = os.umask(0o027)
    try:
        minilora.save_adapter(model, tmp_path / "adapter")
    finally:
        os.umask(before)
    for path in (tmp_path / "adapter").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_metadata_is_pefts(saved):
    with safetensors.safe_open(saved / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.pop(f"{PREFIX}.lora_A.weight"))
    assert_refused(saved, f"lacks tensor {PREFIX}.lora_A.weight")


def test_a_missing_head_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("base_model.model.classifier.weight"))
    assert_refused(saved, r"lacks tensor base_model\.model\.classifier\.weight")


def test_an_unexpected_tensor_is_named(saved):
    edit_tensors(saved, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert_refused(saved, "has unexpected tensor extra")


def test_a_misshapen_tensor_is_named_with_both_shapes(saved):
    edit_config(saved, r=2)
    assert_refused(saved, r"lora_A\.weight is .*shape \(4, 32\) instead of .*shape \(2, 32\)")


def test_an_integer_tensor_is_refused(saved):
    edit_tensors(saved, lambda tensors: tensors.update({k: t.int() for k, t in tensors.items()}))
    assert_refused(saved, r"is a torch\.int32 tensor")


def test_a_damaged_weights_file_is_refused(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert_refused(saved, "is damaged")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, "\x00"])
def test_a_config_that_is_no_object_is_refused(saved, text):
    (saved / "adapter_config.json").write_text(text)
    assert_refused(saved, r"adapter_config\.json")


def test_another_peft_type_is_refused(saved):
    edit_config(saved, peft_type="IA3")
    assert_refused(saved, "peft_type is 'IA3'")


def test_a_directory_without_an_adapter_says_what_was_looked_for(tmp_path):
    assert_refused(tmp_path, r"found no .*adapter_config\.json")


def test_a_config_without_weights_says_what_was_looked_for(saved):
    (saved / "adapter_model.safetensors").unlink()
    assert_refused(saved, r"neither adapter_model\.safetensors nor adapter_model\.bin")


def test_the_old_pickle_is_read_without_running_code(saved):
    tensors = safetensors.torch.load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    model = tiny_classifier()
    assert minilora.load_adapter(model, saved) == sorted(tensors)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(saved, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (saved / "adapter_model.safetensors").unlink()
    for payload in (pickle.dumps(Payload()), None):
        path = saved / "adapter_model.bin"
        path.write_bytes(payload) if payload else torch.save({"a": Payload()}, path)
        assert_refused(saved, "cannot be read safely")
    assert not (tmp_path / "ran").exists()


def test_biases_under_the_keys_of_peft_0_6_are_read(tmp_path):
    """PEFT 0.21 silently ignores them."""
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(bias="lora_only"))
    for _, parameter in minilora.trainable_parameters(model):
        parameter.data += 1.0
    minilora.save_adapter(model, tmp_path)
    edit_tensors(
        tmp_path,
        lambda tensors: [
            tensors.update({key.replace(".base_layer", ""): tensors.pop(key)})
            for key in list(tensors)
        ],
    )
    again = tiny_classifier()
    minilora.load_adapter(again, tmp_path)
    assert torch.equal(
        again.bert.encoder.layer[0].attention.self.query.bias,
        model.bert.encoder.layer[0].attention.self.query.bias,
    )


def test_the_junk_that_peft_writes_with_bias_all_is_dropped(saved):
    edit_config(saved, bias="all")
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=4, bias="all"))
    minilora.save_adapter(model, saved)
    junk = {
        "base_model.model.classifier.modules_to_save.bias": torch.zeros(2),
        "base_model.model.classifier.original_module.bias": torch.zeros(2),
    }
    edit_tensors(saved, lambda tensors: tensors.update(junk))
    assert not set(minilora.load_adapter(tiny_classifier(), saved)) & set(junk)


def test_an_adapter_of_another_name_lives_in_its_own_folder(tmp_path):
    """As in PEFT, and PEFT finds it there."""
    import peft

    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS"), "other")
    minilora.save_adapter(model, tmp_path, "other")
    assert (tmp_path / "other" / "adapter_config.json").exists()
    minilora.load_adapter(tiny_classifier(), tmp_path, "other")
    peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path, subfolder="other")


def test_loading_into_an_existing_adapter_keeps_its_parameters(saved):
    """An optimizer that holds them stays valid."""
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=4))
    before = dict(minilora.trainable_parameters(model))
    minilora.load_adapter(model, saved, is_trainable=True)
    after = dict(minilora.trainable_parameters(model))
    assert all(before[name] is after[name] for name in before)
    other = tiny_classifier()
    minilora.load_adapter(other, saved)
    ids = torch.arange(8).reshape(2, 4)
    assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


def test_loading_into_an_existing_adapter_checks_the_config(saved):
    """PEFT ignores the file's config here (alpha 64 on disk, scaling stays 2)."""
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=64))
    with pytest.raises(MiniloraError, match="lora_alpha: 8 -> 64"):
        minilora.load_adapter(model, saved)


def test_saving_into_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig())
    for name in ("file", "link"):
        with pytest.raises(MiniloraError, match=f"{name} is no directory"):
            minilora.save_adapter(model, tmp_path / name)


def test_saving_leaves_a_readme_of_the_user_alone(saved):
    (saved / "README.md").write_text("mine")
    model = tiny_classifier()
    minilora.load_adapter(model, saved)
    minilora.save_adapter(model, saved)
    assert (saved / "README.md").read_text() == "mine"
    assert not [p for p in saved.iterdir() if p.name.startswith(".tmp-")]
    shutil.rmtree(saved)


def test_an_adapter_parsed_from_bytes_is_the_one_that_is_read(saved):
    stored = read_adapter(saved)
    names = ("adapter_config.json", "adapter_model.safetensors")
    parsed = parse_adapter(saved, *((saved / name).read_bytes() for name in names))
    assert parsed.config == stored.config and parsed.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(parsed.tensors[key], stored.tensors[key]) for key in stored.tensors)


def test_checking_an_adapter_changes_nothing(saved):
    model = tiny_classifier()
    minilora.add_adapter(model, LoraConfig(task_type="SEQ_CLS", r=4))
    before = {key: tensor.clone() for key, tensor in minilora.adapter_state_dict(model).items()}
    check_adapter(model, read_adapter(saved))
    after = minilora.adapter_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_rank_beyond_the_tensors_is_refused_before_memory_is_taken(saved):
    for changes in ({"r": 10**12}, {"rank_pattern": {"query": 10**12}}):
        edit_config(saved, **changes)
        assert_refused(saved, "asks for rank 1000000000000")
