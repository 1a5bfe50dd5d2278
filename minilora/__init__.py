"""LoRA for BERT encoders, a resume you can prove, files that PEFT and HF Trainer read and write.

Names resolve on first use, so that a command can parse its arguments without importing torch.
"""

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # the public names, for editors, type checkers, and `_ROOM_OF`
    from minilora.errors import MiniloraError
    from minilora.fine_tuning import TrainResult, fine_tune
    from minilora.lora.adapters import add_adapter, delete_adapter, disable_adapter, set_adapter
    from minilora.lora.adapters import trainable_parameters
    from minilora.lora.combine import add_weighted_adapter, combine_adapters
    from minilora.lora.config import LoraConfig
    from minilora.lora.merge import merge_adapter, merge_and_unload, unload, unmerge_adapter
    from minilora.lora.mixed_batch import adapter_names
    from minilora.lora.peft_files import adapter_state_dict, load_adapter, save_adapter
    from minilora.trained.compare import compare_directories
    from minilora.trained.directory import inspect_directory
    from minilora.trained.merge import write_merged_model
    from minilora.trained.opened import TrainedRun, open_run
    from minilora.trained.predict import predict_texts
    from minilora.trained.report import write_report
    from minilora.trained.score import Scores, evaluate_file
    from minilora.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from minilora.training.config import TrainConfig
    from minilora.training.loop import Timetable, Training, TrainState
    from minilora.training.record import RunRecord

# The imports above, read instead of run: each public name and the room that has it.
_ROOM_OF = {
    name: room
    for room, names in re.findall(r"    from (minilora\S+) import (.+)", Path(__file__).read_text())
    for name in names.split(", ")
}

__all__ = sorted(_ROOM_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)
