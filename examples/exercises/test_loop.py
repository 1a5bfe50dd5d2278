"""Exercise 3 against torch, transformers, and minilora's own loop."""

from types import SimpleNamespace

import pytest
import torch
from answers.ex3_loop import Settings, epoch_batches, share_of_peak, train, training_step
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

from minilora import LoraConfig, TrainConfig, Training, add_adapter
from minilora.bert.forward import Padded
from minilora.bert.tasks import build_task
from minilora.training.loop import Callbacks, Timetable, fit
from minilora.training.optim import build_optimizer, build_scheduler

COUNT = 11  # 3 batches and so 2 steps an epoch, the second of one batch of 3 examples


class Line(nn.Module):
    """A linear model called as transformers' are, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1, bias=False).double()

    def forward(self, x, labels):
        return SimpleNamespace(loss=((self.layer(x)[:, 0] - labels) ** 2).mean())


def points(count: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(1)).double() * size
    return {"x": drawn[:, :3], "labels": drawn[:, 3]}


def cut(examples: dict[str, torch.Tensor], at: int) -> list[dict[str, torch.Tensor]]:
    return [{k: v[part] for k, v in examples.items()} for part in (slice(at), slice(at, None))]


def bert() -> nn.Module:
    """A tiny BERT with a LoRA and a trained head, in float64 so that rounding is no excuse."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    model = BertForSequenceClassification(config)
    add_adapter(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, task_type="SEQ_CLS"))
    return model.double()


def sentences() -> dict[str, torch.Tensor]:
    """The label is whether token 5 is there."""
    ids = torch.randint(5, 9, (COUNT, 6), generator=torch.Generator().manual_seed(2))
    rest = {"attention_mask": torch.ones_like(ids), "labels": (ids == 5).any(dim=1).long()}
    return {"input_ids": ids} | rest


def test_the_schedule_is_transformers():
    schedule = get_linear_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)]), 3, 10)
    for step in range(11):
        found, expected = share_of_peak(step, 3, 10), schedule.lr_lambdas[0](step)
        assert found == pytest.approx(expected), (
            f"after {step} steps of 10 with a warmup of 3 the share is {expected:.3f}, not {found}."
            " The first step is taken at 0; the peak is at step 3; the end, 0, is at step 10"
        )
    assert share_of_peak(0, 0, 10) == 1, "without warmup the first step is at the peak"


def test_an_epoch_is_an_order_of_all_examples_that_only_seed_and_epoch_decide():
    state, examples = torch.get_rng_state(), {"labels": torch.arange(COUNT)}
    batches = [batch["labels"] for batch in epoch_batches(examples, 4, seed=7, epoch=1)]
    assert torch.equal(state, torch.get_rng_state()), "it draws from torch's global generator"
    assert [len(batch) for batch in batches] == [4, 4, 3], "11 examples are 4 + 4 + 3"
    expected = torch.randperm(COUNT, generator=torch.Generator().manual_seed(8))
    assert torch.equal(torch.cat(batches), expected), "not the order that step 2 gives"


def test_accumulated_batches_are_one_large_batch():
    one, other, examples = Line(), Line(), points(6)
    whole = one(**examples).loss
    whole.backward()
    sgd = torch.optim.SGD(other.parameters(), lr=1.0)
    loss, norm = training_step(other, sgd, cut(examples, 4), 1e9)
    expected = one.layer.weight.grad.norm().item()
    assert norm == pytest.approx(expected), (
        f"the gradient of batches of 4 and 2 has the norm {norm:.4f}; that of one batch of 6 has "
        f"{expected:.4f}. Each batch's mean loss counts by its share of the examples, "
        "len(batch) / 6: neither their sum nor 1 / 2 each"
    )
    assert loss == pytest.approx(whole.item()), "the step's loss is not the mean over 6 examples"


def test_the_step_is_clipped_once_and_tells_the_norm_before():
    model = Line()
    before = model.layer.weight.detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    _, norm = training_step(model, sgd, cut(points(6, size=10), 4), 0.5)
    moved = model.layer.weight.detach() - before
    assert norm > 1, f"the norm before clipping is large here; yours is {norm:.3f}"
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-3), (
        f"a gradient clipped to the norm 0.5 moves the parameters by 0.5 (lr 1), not by "
        f"{moved.norm():.3f}. Clip once, after the last backward and before the step"
    )


def test_a_step_leaves_no_gradient_to_the_next():
    model = Line()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = [training_step(model, still, [points(6)], 1e9)[1] for _ in range(2)]
    assert norms[1] == pytest.approx(norms[0]), (
        f"the same step has the norm {norms[0]:.3f} and then {norms[1]:.3f}: the first one's "
        "gradients are in the second. zero_grad() belongs to each step"
    )


def test_the_run_is_minilora_s():
    settings, examples, mine, ours = Settings(), sentences(), bert(), bert()
    torch.manual_seed(3)  # the masks of dropout
    rows = train(mine.eval(), examples, settings)
    expected = rows_of_minilora(ours, examples, settings)
    assert [row["step"] for row in rows] == [2, 4, 6], "11 examples, 3 epochs: 6 steps, 3 rows"
    for key in ("learning_rate", "loss", "grad_norm"):
        found, right = ([row[key] for row in each] for each in (rows, expected))
        assert found == pytest.approx(right, rel=1e-4, abs=1e-9), (
            f"{key} is {found} and should be {right}. learning_rate: that of this step; loss: the "
            "mean since the last row. Is the model in training mode, weight_decay 0?"
        )
    named = dict(ours.named_parameters())
    wrong = [n for n, p in mine.named_parameters() if not torch.allclose(p, named[n], atol=1e-6)]
    assert not wrong, f"the log agrees, but not what was learned: {wrong[:3]}"


def rows_of_minilora(model, examples, settings) -> list[dict[str, float]]:
    numbers = {"learning_rate": settings.learning_rate, "max_grad_norm": settings.max_grad_norm}
    config = TrainConfig(warmup_steps=settings.warmup, **numbers)
    optimizer, timetable = build_optimizer(model, config), Timetable(6, 2, 3, 2, logging_steps=2)
    scheduler, task = build_scheduler(optimizer, config, 6), build_task(config, ["no", "yes"])
    training = Training(model, optimizer, scheduler, Padded(model, 0), task, timetable=timetable)

    def batches(epoch: int, skipped: int):
        generator = torch.Generator().manual_seed(settings.seed + epoch)
        order = torch.randperm(COUNT, generator=generator).split(4)
        parts = [{k: v[part] for k, v in examples.items()} | {"example": part} for part in order]
        yield from (parts[:2], parts[2:])

    rows: list[dict[str, float]] = []
    torch.manual_seed(3)
    fit(training, config, Callbacks(batches, None, rows.append, bool, bool, lambda *_: None))
    return rows
