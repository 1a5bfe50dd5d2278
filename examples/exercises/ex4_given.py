"""What exercise 4 is given: data, a model whose steps draw from three random generators, and the
numbers of the run. Nothing here is to be changed.
"""

import random

import numpy as np
import torch
from torch import Tensor, nn

SEED = 7
EXAMPLES = 11
EPOCHS = 3
BATCH_SIZE = 2
ACCUMULATION = 2  # batches in a step: an epoch is 4 + 4 + 3 examples in 3 steps
STEPS_PER_EPOCH = 3
TOTAL_STEPS = EPOCHS * STEPS_PER_EPOCH
SAVE_STEPS = 2
LOGGING_STEPS = 4
LEARNING_RATE = 0.05

_fixed = torch.Generator().manual_seed(1)
X = torch.randn(EXAMPLES, 6, generator=_fixed)
Y = torch.randn(EXAMPLES, 1, generator=_fixed)


class Model(nn.Module):
    """A frozen layer, a LoRA beside it, dropout, a head. Its first values, those of the frozen
    layer included, are drawn from torch's global generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A = nn.Linear(6, 2, bias=False)
        self.lora_B = nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_B(self.lora_A(self.dropout(x)))
        return self.head(torch.tanh(self.base_layer(x) + 2.0 * update))


def loss_sum(model: nn.Module, indices: list[int]) -> Tensor:
    """The loss of these examples, added up. Draws from python's generator, numpy's, and in the
    model torch's, as augmentation of data and dropout do.
    """
    x = X[indices] * random.gauss(1.0, 0.1)
    x = x + torch.from_numpy(np.random.normal(0.0, 0.1, size=x.shape)).float()
    return ((model(x) - Y[indices]) ** 2).sum()


def share_of_peak(step: int) -> float:
    """The learning rate after `step` steps as a share of LEARNING_RATE: for LambdaLR."""
    return 1.0 - step / TOTAL_STEPS
