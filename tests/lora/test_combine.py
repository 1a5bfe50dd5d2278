"""Several adapters in one: W plus the weighted sum of their updates, by PEFT's own deltas."""

import math
from collections import defaultdict

import peft
import pytest
import torch
from transformers import BertForMaskedLM

from minilora import (
    LoraConfig,
    MiniloraError,
    add_adapter,
    add_weighted_adapter,
    combine_adapters,
    load_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
)
from minilora.lora.embedding import LoRAEmbedding
from minilora.lora.layer import LoRALinear
from tests.conftest import tiny_classifier, tiny_config
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
    with pytest.raises(MiniloraError, match="give a number for each|cannot sum to 0"):
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


def beside(tmp_path, *settings):
    """The same adapters, "a", "b", ..., in minilora's model and in PEFT's."""
    paths = saved(tmp_path, *settings)
    ours, names = tiny_classifier().eval(), list("abc"[: len(paths)])
    for name, path in zip(names, paths, strict=True):
        load_adapter(ours, path, name)
    theirs = peft.PeftModel.from_pretrained(tiny_classifier().eval(), paths[0], "a")
    for name, path in zip(names[1:], paths[1:], strict=True):
        theirs.load_adapter(path, name)
    return ours, theirs, names


def deltas(model, name):
    """Of each adapted module, in PEFT's model or ours."""
    found = {}
    for place, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            found[place.removeprefix("base_model.model.")] = layer.get_delta_weight(name)
        elif isinstance(layer, LoRALinear | LoRAEmbedding) and name in layer.adapters:
            found[place] = layer.adapters[name].delta_weight()
    return found


HEADLESS = {"target_modules": ["query", "value"], "lora_alpha": 4}
COMBINATIONS = {
    "svd": (HEADLESS, {**HEADLESS, "r": 4, "lora_alpha": 12}),
    "svd of other targets": (HEADLESS, {**HEADLESS, "target_modules": ["key", "word_embeddings"]}),
    "svd of rank 3": (HEADLESS, HEADLESS),
    "cat": (HEADLESS, {**HEADLESS, "r": 4, "lora_alpha": 12}),
    "cat of patterns": (
        HEADLESS,
        {**HEADLESS, "rank_pattern": {"layer.0.attention.self.query": 2}},
    ),
    "cat of three": (HEADLESS, {**HEADLESS, "r": 2}, HEADLESS),
    "linear": (HEADLESS, {**HEADLESS, "lora_alpha": 1}),
    "linear of embeddings": ({**HEADLESS, "target_modules": ["word_embeddings"]},) * 2,
    "svd of one": (HEADLESS,),
}


@pytest.mark.parametrize("case", COMBINATIONS)
@pytest.mark.parametrize("weights", [[0.7, 0.3, 0.5], [1.5, -1.0, 0.5]])
def test_a_weighted_adapter_is_pefts(case, weights, tmp_path):
    """Its update in each module, the rank that its file states, and that it waits for its turn."""
    ours, theirs, names = beside(tmp_path, *COMBINATIONS[case])
    weights, kind = weights[: len(names)], case.split()[0]
    rank = 3 if "rank 3" in case else None
    theirs.add_weighted_adapter(names, weights, "new", kind, svd_rank=rank)
    active = ours.minilora_adapters.active
    add_weighted_adapter(ours, names, weights, "new", kind, rank)
    expected, found = deltas(theirs, "new"), deltas(ours, "new")
    assert found.keys() == expected.keys()
    for place, delta in expected.items():
        assert (found[place] - delta).norm() < 1e-5 * delta.norm(), place
    config = ours.minilora_adapters.configs["new"]
    assert (config.r, config.lora_alpha) == (theirs.peft_config["new"].r,) * 2
    assert ours.minilora_adapters.active == active
    set_adapter(ours, "new")
    save_adapter(ours, tmp_path / "saved", "new")
    again = peft.PeftModel.from_pretrained(tiny_classifier().eval(), tmp_path / "saved" / "new")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(ours(ids).logits, again(ids).logits)


def test_linear_is_not_the_sum_of_the_updates(tmp_path):
    """So that the comparison with PEFT's would tell linear from exact."""
    ours, _, names = beside(tmp_path, HEADLESS, HEADLESS)
    for kind in ("linear", "cat"):
        add_weighted_adapter(ours, names, [0.5, 0.5], kind, kind)
    place = "bert.encoder.layer.0.attention.self.query"
    linear, exact = deltas(ours, "linear")[place], deltas(ours, "cat")[place]
    assert (linear - exact).norm() > 0.1 * exact.norm()


def test_rslora_and_heads_are_combined_as_combine_adapters_does(tmp_path):
    """PEFT's is too large by sqrt(r), and refuses two heads."""
    settings = [{**PLAIN, "use_rslora": True}, {**PLAIN, "r": 2, "use_rslora": True}]
    ours, theirs, names = beside(tmp_path, *settings)
    with pytest.raises(ValueError, match="modules_to_save"):
        theirs.add_weighted_adapter(names, WEIGHTS, "new", "cat")
    add_weighted_adapter(ours, names, WEIGHTS, "new", "cat")
    merged = merge_and_unload(ours, ["new"]).state_dict()
    paths = [tmp_path / "0", tmp_path / "1"]
    expected = combine_adapters(tiny_classifier(), paths, WEIGHTS).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "setting, stays_tied",
    [
        ({"trainable_token_indices": [2, 6]}, True),
        ({"bias": "all"}, True),
        ({"target_modules": ["word_embeddings"]}, False),  # whose update the output does not see
    ],
)
def test_what_is_tied_stays_tied_unless_an_adapter_parts_it(setting, stays_tied, tmp_path):
    model = BertForMaskedLM(tiny_config())
    add_adapter(model, LoraConfig(**setting))
    for name, parameter in model.named_parameters():
        if ".adapters." in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter")
    plain = BertForMaskedLM(tiny_config())
    combine_adapters(plain, [tmp_path / "adapter"], [0.5])
    output = plain.get_output_embeddings()
    assert (output.weight is plain.get_input_embeddings().weight) == stays_tied
    assert plain.config.tie_word_embeddings == stays_tied
    assert (output.bias is plain.cls.predictions.bias) == stays_tied


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a", "b"], [1, 1], "b"), "adapter 'b' exists"),
        ((["a", "c"], [1, 1], "new"), r"no adapter named \['c'\]"),
        (([], [], "new"), "no adapter named nothing"),
        ((["a", "b"], [1], "new"), r"weights are \[1\] for 2 adapters"),
        ((["a", "b"], [1, math.inf], "new"), "give a number for each"),
        ((["a", "b"], [1, -1], "new", "cat"), "heads are averaged, so they cannot sum to 0"),
        ((["a", "b"], [1, 1], "new", "ties"), "must be one of svd, cat, linear"),
        ((["a", "b"], [1, 1], "new", "svd", 0), "svd_rank is 0; it must be 1 or more"),
        ((["a", "b"], [1, 1], "new", "cat", 4), "svd_rank is 4; .* only for svd"),
        ((["a", "b"], [1, 1], "new", "linear"), r"linear needs one r; .* has \[4, 8\]"),
        ((["d"], [1], "new"), "has DoRA, lora_bias or trained rows"),
    ],
)
def test_a_weighted_adapter_that_cannot_be_is_refused_and_nothing_is_changed(
    arguments, message, tmp_path
):
    ours, _, _ = beside(tmp_path, PLAIN, {**PLAIN, "r": 4})
    add_adapter(ours, LoraConfig(use_dora=True), "d")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(MiniloraError, match=message):
        add_weighted_adapter(ours, *arguments)
    after = ours.state_dict()
    assert after.keys() == before.keys() and list(ours.minilora_adapters.configs) == ["a", "b", "d"]
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_broken_matrix_is_found_before_an_adapter_is_added(matrix, tmp_path):
    ours, _, names = beside(tmp_path, PLAIN, PLAIN)
    layer = ours.bert.encoder.layer[1].attention.self.query
    getattr(layer.adapters[names[0]], matrix).weight.data[0, 0] = math.nan
    with pytest.raises(MiniloraError, match=r"gives NaN or infinity in .*layer\.1\..*query"):
        add_weighted_adapter(ours, names, [1, 2], "new", "cat")
    assert list(ours.minilora_adapters.configs) == names
