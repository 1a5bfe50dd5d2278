"""Several adapters folded into one model, each with a weight.

    W' = W + sum_i w_i scaling_i B_i A_i            any ranks; embeddings likewise
    b' = b + sum_i w_i (b_i - b)                    trained biases
    H' = sum_i w_i H_i / sum_i w_i                  heads and other modules_to_save

An update is a difference and is scaled by its weight; a head is none, so heads are averaged. What
is no plain sum (DoRA's weight, rows trained in full, the weights pissa and olora reduce) takes part
as the difference it makes to W when merged alone. Sums are taken in float64 and rounded once.

PEFT's `add_weighted_adapter` refuses adapters with heads and is too large by sqrt(r) with rslora.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.errors import MiniloraError
from minilora.lora.adapter_files import load_adapter
from minilora.lora.inject import adapter_layers
from minilora.lora.layer import LoRALinear
from minilora.lora.embedding import LoRAEmbedding
from minilora.lora.merge import merge_and_unload, unload
from minilora.lora.modules_to_save import ModulesToSave
