"""HF Trainer's `trainer_state.json`, to and from our `TrainState` (transformers 5.23
`TrainerState`).

Trainer refuses a file with a key it does not know and fails later on one that lacks
`stateful_callbacks`, so the keys here are exactly its own.
"""

import json
from typing import Any

from minilora.training.loop import Cadence, TrainState, epochs_done

STATE_NAME = "trainer_state.json"


def trainer_state(
    state: TrainState,
    cadence: Cadence,
    num_train_epochs: int,
    train_batch_size: int,
    best_checkpoint: str | None,
) -> bytes:
    """The bytes of `trainer_state.json`.

    Args:
        best_checkpoint: path of the best checkpoint, as Trainer records it.
    """
    values: dict[str, Any] = {
        "best_global_step": state.best_step,
        "best_metric": state.best_metric,
        "best_model_checkpoint": best_checkpoint,
        "epoch": epochs_done(state, cadence),
        "eval_steps": cadence.eval_steps or cadence.logging_steps,
        "global_step": state.global_step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": state.log_history,
        "logging_steps": cadence.logging_steps,
        "max_steps": cadence.max_steps,
        "num_input_tokens_seen": 0,
        "num_train_epochs": num_train_epochs,
        "save_steps": cadence.save_steps or 500,
        "stateful_callbacks": {"TrainerControl": _control(state.global_step >= cadence.max_steps)},
        "total_flos": 0,
        "train_batch_size": train_batch_size,
        "trial_name": None,
        "trial_params": None,
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def _control(finished: bool) -> dict[str, Any]:
    switches = {
        "should_epoch_stop": False,
        "should_evaluate": False,
        "should_log": False,
        "should_save": True,
        "should_training_stop": finished,
    }
    return {"args": switches, "attributes": {}}
