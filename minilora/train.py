"""Fine-tune a BERT with LoRA, from a labelled text file to an adapter that PEFT loads.

python -m minilora.train                                    the packaged sentences and model
python -m minilora.train --train_file F --validation_file F --output_dir OUT
python -m minilora.train --resume_from_checkpoint OUT       nothing else needed
"""

import shlex
import sys
from typing import TYPE_CHECKING, Any

from minilora.command import INTERRUPTED, Parser, run_command, stop_signals, without_collection
from minilora.files import json_text
from minilora.lora.config import LoraConfig
from minilora.options import add_flags, given_flags
from minilora.training.config import LORA_DEFAULTS, TrainConfig

if TYPE_CHECKING:
    from minilora.fine_tuning import TrainResult


def main() -> int:
    train, lora = parse_arguments(sys.argv[1:])
    if "resume_from_checkpoint" not in train:
        # Bad values are answered before torch is imported.
        TrainConfig(**train)
        LoraConfig(**lora)
    with stop_signals() as received:
        with without_collection():  # the slow import: torch and transformers
            from minilora.fine_tuning import run_fine_tuning
        result = run_fine_tuning(train, lora, should_stop=lambda: bool(received))
    print_summary(result, stopped=bool(received))
    return INTERRUPTED + received[0] if received else 0


def parse_arguments(arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The given flags of the run and of the adapter, by field name; flags not given are absent."""
    parser = Parser("train", usage=__doc__)
    add_flags(parser, TrainConfig)
    add_flags(parser, LoraConfig, defaults=LORA_DEFAULTS)
    namespace = parser.parse_args(arguments)
    train = given_flags(TrainConfig, namespace)
    if "save_steps" in train:  # alone it means this, as with TrainingArguments
        train.setdefault("save_strategy", "steps")
    return train, given_flags(LoraConfig, namespace)


def print_summary(result: "TrainResult", stopped: bool) -> None:
    """What came out, where it is, what to do next; last, one JSON object."""
    place = shlex.quote(result.output_dir)
    if stopped:
        print(f"stopped at step {result.global_step}; nothing is lost")
    else:
        untrained = next((row for row in result.log_history if row["step"] == 0), {})
        for name, value in result.metrics.items():
            if name.startswith(("eval_", "test_")) and not name.endswith(("runtime", "second")):
                before = untrained.get(name)
                told = "" if before is None else f"   untrained {before:.3f}"
                print(f"{name:<26}{value:.3f}{told}")
        print(f"adapter:  {result.output_dir}, which PEFT loads, too")
        print(f"evaluate: python -m minilora.evaluate {place} --file FILE")
        print(f'predict:  python -m minilora.predict {place} --text "..."')
        print(f"merge:    python -m minilora.merge {place} --output_dir DIRECTORY")
    print(f"resume:   python -m minilora.train --resume_from_checkpoint {place}")
    summary = {"global_step": result.global_step, "output_dir": result.output_dir}
    print(json_text({**result.metrics, **summary}))


if __name__ == "__main__":
    run_command(main)
