"""Exercise 1 against PEFT's own layer."""

import math

import torch
from answers.ex1_layer import LoRALinear
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

IN, OUT, R, ALPHA = 20, 12, 4, 12


def two_layers(lora_dropout: float = 0.0) -> tuple[LoRALinear, nn.Module, Tensor]:
    """Yours and PEFT's over the same W and b, with the same A and B, none of them zero, and x."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT)
    theirs = nn.Sequential(nn.Linear(IN, OUT))
    theirs[0].load_state_dict(base.state_dict())
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=lora_dropout, target_modules=["0"])
    peft_layer = inject_adapter_in_model(config, theirs)[0]
    layer = LoRALinear(base, R, ALPHA, lora_dropout)
    with torch.no_grad():
        for own, name in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
            own.weight.copy_(torch.randn_like(own.weight))
            getattr(peft_layer, name)["default"].weight.copy_(own.weight)
    return layer, peft_layer, torch.randn(3, 5, IN)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_it_starts_as_its_base_layer():
    base, x = nn.Linear(IN, OUT), torch.randn(3, IN)
    expected = base(x)
    difference = (LoRALinear(base, R, ALPHA)(x) - expected).abs().max().item()
    assert difference == 0, (
        f"a new layer's output is {difference:.3g} away from its base layer's. B must start at "
        "zero: then B A x is zero, and training starts from the model as it was"
    )


def test_A_is_drawn_as_a_linear_layer_draws_its_weight():
    A = LoRALinear(nn.Linear(400, OUT), 100, ALPHA).lora_A.weight
    bound = 1 / math.sqrt(400)
    assert A.shape == (100, 400), f"A is (r, in_features), here (100, 400), not {tuple(A.shape)}"
    assert A.abs().max() > 0, "A is zero like B: then both gradients are zero, and neither moves"
    assert bound * 0.9 < A.abs().max() <= bound and abs(A.mean()) < bound / 20, (
        f"A should be uniform between -1/sqrt(in_features) and +1/sqrt(in_features), {bound:.3f}; "
        f"yours lies between {A.min():.3f} and {A.max():.3f}. nn.Linear draws it so by itself"
    )


def test_only_A_and_B_learn():
    layer, _, x = two_layers()
    learning = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert learning == {"lora_A.weight", "lora_B.weight"}, (
        f"what learns is {sorted(learning)}. The base layer is frozen, its bias included, and "
        "lora_A and lora_B are nn.Linear(bias=False)"
    )
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = layer.base_layer.weight.clone()
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.base_layer.weight, before), "a training step has moved W"


def test_the_output_is_PEFTs():
    layer, theirs, x = two_layers()
    update, expected = layer(x) - layer.base_layer(x), theirs(x) - theirs.base_layer(x)
    factor = (update.norm() / expected.norm()).item()
    assert close(update, expected), (
        f"the update is {factor:.3g} times as large as PEFT's. scaling is lora_alpha / r, "
        f"here {ALPHA} / {R} = {ALPHA / R}. Near 1 the size is right and B A x is not"
    )


def test_the_gradients_are_PEFTs():
    layer, theirs, x = two_layers()
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        mine, expected = getattr(layer, name).weight.grad, getattr(theirs, name)["default"].weight
        assert mine is not None, f"{name} gets no gradient: is there a detach() or a .data?"
        assert close(mine, expected.grad), f"the gradient of {name} is not PEFT's"


def test_dropout_is_of_what_A_sees_and_nothing_else():
    layer, theirs, x = two_layers(lora_dropout=0.5)
    found = []
    for module in (layer, theirs):
        module.train()
        torch.manual_seed(1)
        found.append(module(x))
    assert close(*found), (
        "in training mode the output is not PEFT's with the same seed. dropout is applied to x on "
        "its way to A, once, before A; W sees x whole"
    )
    layer.eval(), theirs.eval()
    assert close(layer(x), theirs(x)), "dropout is at work in eval mode: use nn.Dropout"


def test_merging_folds_the_update_into_W_and_changes_no_output():
    layer, theirs, x = two_layers()
    before, expected = layer(x), theirs.base_layer.weight + theirs.get_delta_weight("default")
    layer.merge()
    assert close(layer.base_layer.weight, expected), "the merged weight is not W + scaling * B A"
    assert close(layer(x), before), (
        "merging has changed the output. A merged layer is its base layer alone; if forward adds "
        "B A x still, the update counts twice"
    )
    layer.merge()
    assert close(layer.base_layer.weight, expected), "merging twice has added the update twice"


def test_unmerging_gives_back_every_bit_of_W():
    layer, _, x = two_layers()
    before, output = layer.base_layer.weight.clone(), layer(x)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before), "it was not merged, and W has changed"
    layer.merge()
    layer.unmerge()
    wrong = (layer.base_layer.weight != before).sum().item()
    assert wrong == 0, (
        f"{wrong} of {before.numel()} numbers of W came back changed. (W + d) - d is not W in "
        "floating point: keep a copy of W, and put that back"
    )
    assert torch.equal(layer(x), output), "an unmerged layer adds the update beside W again"
