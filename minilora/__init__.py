"""minilora: LoRA for BERT encoders, a resume you can prove, files that PEFT and HF Trainer read and
write.

Names resolve on first use, so that a command can parse its arguments without importing torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers, what `_ROOMS` says
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
    from minilora.trained.score import Scores, evaluate_file
    from minilora.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from minilora.training.config import TrainConfig
    from minilora.training.loop import Timetable, Training, TrainState
    from minilora.training.record import RunRecord

_ROOMS = {
    "errors": "MiniloraError",
    "fine_tuning": "TrainResult fine_tune",
    "lora.adapters": "add_adapter delete_adapter disable_adapter set_adapter trainable_parameters",
    "lora.combine": "add_weighted_adapter combine_adapters",
    "lora.config": "LoraConfig",
    "lora.merge": "merge_adapter merge_and_unload unload unmerge_adapter",
    "lora.mixed_batch": "adapter_names",
    "lora.peft_files": "adapter_state_dict load_adapter save_adapter",
    "trained.compare": "compare_directories",
    "trained.directory": "inspect_directory",
    "trained.merge": "write_merged_model",
    "trained.opened": "TrainedRun open_run",
    "trained.predict": "predict_texts",
    "trained.score": "Scores evaluate_file",
    "training.checkpoint": "latest_checkpoint load_checkpoint save_checkpoint",
    "training.config": "TrainConfig",
    "training.loop": "Timetable TrainState Training",
    "training.record": "RunRecord",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_ROOM_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minilora.{_ROOM_OF[name]}"), name)
