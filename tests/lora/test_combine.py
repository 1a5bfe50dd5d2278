"""Several adapters in one model: W plus the weighted sum of their updates, by PEFT's own deltas."""

from collections import defaultdict

import peft
import pytest
import torch

from minilora import (
    LoraConfig,
    MiniloraError,
    add_adapter,
    combine_adapters,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from tests.conftest import tiny_classifier
from tests.lora.test_mixed_batch import PLAIN, draw_values

WEIGHTS = [0.7, 0.3]
SETTINGS = {
    "ranks 8 and 4": (PLAIN, {**PLAIN, "r": 4}),
    "other targets": (PLAIN, {**PLAIN, "target_modules": ["key", "word_embeddings"]}),
    "rslora": ({**PLAIN, "use_rslora": True}, {**PLAIN, "r": 2, "use_rslora": True}),
}  # fmt: skip


def saved(tmp_path, *settings):
    """Adapters on the same base, each in a directory of its own."""
    paths = []
    for index, setting in enumerate(settings):
        model = tiny_classifier()
        add_adapter(model, LoraConfig(**setting))
        draw_values(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Not the same draws twice; and biases that are trained.
                if ".adapters." in name:
                    parameter.mul_(1 + index)
                elif name.endswith(".bias") and parameter.requires_grad:
                    parameter.add_(0.1 * (1 + index))
        save_adapter(model, tmp_path / str(index))
        paths.append(tmp_path / str(index))
    return paths


def merged_alone(path):
    model = tiny_classifier()
    load_adapter(model, path)
    return merge_and_unload(model).state_dict()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_arithmetic_is_that_of_pefts_deltas(settings, tmp_path):
    """Bitwise, in float64 rounded once; heads (their weights sum to 1) up to the last bit."""
    paths = saved(tmp_path, *settings)
    sums, head = defaultdict(int), {"weight": 0, "bias": 0}
    for path, weight in zip(paths, WEIGHTS, strict=True):
        theirs = peft.PeftModel.from_pretrained(tiny_classifier(), path).base_model.model
        for name, layer in theirs.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                delta = layer.get_delta_weight("default").detach().double()
                sums[f"{name}.weight"] += weight * delta
        for part, value in theirs.classifier.modules_to_save["default"].named_parameters():
            head[part] = head[part] + weight * value.detach().double()
    plain = tiny_classifier().state_dict()
    found = combine_adapters(tiny_classifier(), paths, WEIGHTS).state_dict()
    assert found.keys() == plain.keys() and sums.keys() < plain.keys()
    for part, value in head.items():
        torch.testing.assert_close(found.pop(f"classifier.{part}"), value.float())
    for name, value in found.items():
        assert torch.equal(value, (plain[name].double() + sums[name]).float()), name


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [3, 5]},
        {"modules_to_save": ["pooler"]},
    ],
    ids=str,
)
def test_one_adapter_with_weight_1_is_merged_as_ever(extra, tmp_path):
    (path,) = saved(tmp_path, {**PLAIN, **extra})
    expected = merged_alone(path)
    found = combine_adapters(tiny_classifier(), [path], [1.0]).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    # And half of it lies half-way.
    plain = tiny_classifier().state_dict()
    half = combine_adapters(tiny_classifier(), [path], [0.5]).state_dict()
    for name, value in expected.items():
        if not name.startswith(("classifier", "bert.pooler")):
            torch.testing.assert_close(half[name], (plain[name] + value) / 2, rtol=1e-5, atol=1e-6)


def test_mixed_kinds_add_up(tmp_path):
    """DoRA, trained biases and pissa beside plain LoRA: the differences of each merged alone."""
    kinds = [{}, {"use_dora": True}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"}]
    paths = saved(tmp_path, *({**PLAIN, **kind} for kind in kinds))
    weights = [0.4, 0.3, 0.2, 0.1]
    plain = tiny_classifier().state_dict()
    alone = [merged_alone(path) for path in paths]
    found = combine_adapters(tiny_classifier(), paths, weights).state_dict()
    for name, value in plain.items():
        expected = value + sum(
            w * (one[name] - value) for w, one in zip(weights, alone, strict=True)
        )
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


def test_heads_are_averaged_and_updates_are_added(tmp_path):
    """Weights 1 and 1: both updates in full, and a head between the two."""
    paths = saved(tmp_path, PLAIN, PLAIN)
    plain, (a, b) = tiny_classifier().state_dict(), [merged_alone(path) for path in paths]
    found = combine_adapters(tiny_classifier(), paths, [1, 1]).state_dict()
    query, head = "bert.encoder.layer.0.attention.self.query.weight", "classifier.weight"
    torch.testing.assert_close(found[query], a[query] + b[query] - plain[query])
    torch.testing.assert_close(found[head], (a[head] + b[head]) / 2)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [float("nan"), 1.0], []])
def test_weights_that_do_not_fit_are_refused(weights, tmp_path):
    paths = saved(tmp_path, PLAIN, PLAIN)
    with pytest.raises(MiniloraError, match="give a number for each, not summing to 0"):
        combine_adapters(tiny_classifier(), paths, weights)


def test_a_refused_adapter_leaves_the_model_plain(tmp_path):
    (path,) = saved(tmp_path, PLAIN)
    model, plain = tiny_classifier(), tiny_classifier().state_dict()
    with pytest.raises(MiniloraError, match="no adapter in"):
        combine_adapters(model, [path, tmp_path / "nowhere"], WEIGHTS)
    assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())


def test_a_model_that_has_adapters_is_refused(tmp_path):
    (path,) = saved(tmp_path, PLAIN)
    model = tiny_classifier()
    load_adapter(model, path)
    with pytest.raises(MiniloraError, match="takes a plain model"):
        combine_adapters(model, [path], [1.0])
