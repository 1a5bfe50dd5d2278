"""minilora: LoRA for BERT encoders, a resume you can prove, files that PEFT and HF Trainer read and
write.

Names resolve on first use, so that a command can parse its arguments without importing torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minilora.errors import MiniloraError as MiniloraError
    from minilora.fine_tuning import TrainResult as TrainResult
    from minilora.fine_tuning import fine_tune as fine_tune
    from minilora.lora.adapter_files import adapter_state_dict as adapter_state_dict
    from minilora.lora.adapter_files import load_adapter as load_adapter
    from minilora.lora.adapter_files import save_adapter as save_adapter
    from minilora.lora.combine import combine_adapters as combine_adapters
    from minilora.lora.config import LoraConfig as LoraConfig
    from minilora.lora.inject import add_adapter as add_adapter
    from minilora.lora.inject import trainable_parameters as trainable_parameters
    from minilora.lora.merge import merge_adapter as merge_adapter
    from minilora.lora.merge import merge_and_unload as merge_and_unload
    from minilora.lora.merge import unload as unload
    from minilora.lora.merge import unmerge_adapter as unmerge_adapter
    from minilora.lora.mixed import adapter_names as adapter_names
    from minilora.lora.switch import delete_adapter as delete_adapter
    from minilora.lora.switch import disable_adapter as disable_adapter
    from minilora.lora.switch import set_adapter as set_adapter
    from minilora.trained.comparison import compare_directories as compare_directories
    from minilora.trained.inspection import inspect_directory as inspect_directory
    from minilora.trained.merged_model import write_merged_model as write_merged_model
    from minilora.trained.prediction import predict_texts as predict_texts
    from minilora.trained.run import TrainedRun as TrainedRun
    from minilora.trained.run import open_run as open_run
    from minilora.trained.scoring import Scores as Scores
    from minilora.trained.scoring import evaluate_file as evaluate_file
    from minilora.training.checkpoint import latest_checkpoint as latest_checkpoint
    from minilora.training.checkpoint import load_checkpoint as load_checkpoint
    from minilora.training.checkpoint import save_checkpoint as save_checkpoint
    from minilora.training.config import TrainConfig as TrainConfig

_ROOMS = {
    "errors": ["MiniloraError"],
    "lora.adapter_files": ["adapter_state_dict", "load_adapter", "save_adapter"],
    "lora.config": ["LoraConfig"],
    "lora.inject": ["add_adapter", "trainable_parameters"],
    "lora.merge": ["merge_adapter", "merge_and_unload", "unload", "unmerge_adapter"],
    "lora.combine": ["combine_adapters"],
    "lora.mixed": ["adapter_names"],
    "lora.switch": ["delete_adapter", "disable_adapter", "set_adapter"],
    "fine_tuning": ["TrainResult", "fine_tune"],
    "trained.comparison": ["compare_directories"],
    "trained.inspection": ["inspect_directory"],
    "trained.merged_model": ["write_merged_model"],
    "trained.prediction": ["predict_texts"],
    "trained.scoring": ["Scores", "evaluate_file"],
    "trained.run": ["TrainedRun", "open_run"],
    "training.checkpoint": ["latest_checkpoint", "load_checkpoint", "save_checkpoint"],
    "training.config": ["TrainConfig"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_ROOM_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minilora.{_ROOM_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
