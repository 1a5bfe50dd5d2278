"""Fine-tune a BERT with LoRA, from a labelled text file to an adapter that PEFT loads.

    python -m minilora.train                                    the packaged sentences and model
    python -m minilora.train --train_file F --validation_file F --output_dir OUT
    python -m minilora.train --resume_from_checkpoint OUT       nothing else needed

This file is the command: flags in, one JSON line out. What it runs is `fine_tuning.train`.
"""

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

from minilora.command import INTERRUPTED, Parser, run_command, stop_signals, without_collection
from minilora.lora.config import LoraConfig
from minilora.options import add_flags, given_flags
from minilora.training.config import LORA_DEFAULTS, TrainConfig

if TYPE_CHECKING:
    from minilora.fine_tuning import TrainResult


def main() -> int:
    """Parse, train, print. Returns the exit code."""
    train_arguments, lora_arguments = parse_arguments(sys.argv[1:])
    if "resume_from_checkpoint" not in train_arguments:
        # Bad values are answered before torch is imported.
        TrainConfig(**train_arguments)
        LoraConfig(**lora_arguments)
    with stop_signals() as received:
        with without_collection():  # the slow import: torch and transformers
            from minilora.fine_tuning import run_fine_tuning
        result = run_fine_tuning(
            train_arguments, lora_arguments, should_stop=lambda: bool(received)
        )
    print_summary(result, stopped=bool(received))
    return INTERRUPTED + received[0] if received else 0


def parse_arguments(arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The given flags of the run and of the adapter, by field name; flags not given are absent."""
    parser = Parser(
        prog="python -m minilora.train",
        usage="%(prog)s [flags]",
        description="Fine-tune a BERT with LoRA. Without a flag: the packaged sentences and model.",
        allow_abbrev=False,
    )
    add_flags(parser, TrainConfig)
    add_flags(parser, LoraConfig, group="LoRA", defaults=LORA_DEFAULTS)
    namespace = parser.parse_args(arguments)
    return given_flags(TrainConfig, namespace), given_flags(LoraConfig, namespace)


def print_summary(result: "TrainResult", stopped: bool) -> None:
    """What came out, where it is, what to do next; last, one JSON object."""
    place = shlex.quote(result.output_dir)
    if stopped:
        print(f"stopped at step {result.global_step}; nothing is lost")
    else:
        first = result.log_history[:1]
        if first and first[0]["step"] == 0 and "eval_accuracy" in first[0]:
            print(f"accuracy of the untrained head:  {first[0]['eval_accuracy']:.3f}")
        for name, value in result.metrics.items():
            if name.startswith("eval_accuracy"):
                kind = name.removeprefix("eval_accuracy").removeprefix("_")
                what = f"accuracy on {kind}:" if kind else "accuracy after training:"
                print(f"{what:<33}{value:.3f}")
        print(f"adapter:  {result.output_dir}, which PEFT loads, too")
        print(f"evaluate: python -m minilora.evaluate {place} --file FILE")
        print(f'predict:  python -m minilora.predict {place} --text "..."')
        print(f"merge:    python -m minilora.merge {place} --output_dir DIRECTORY")
    print(f"resume:   python -m minilora.train --resume_from_checkpoint {place}")
    summary = {"global_step": result.global_step, "output_dir": result.output_dir}
    print(json.dumps({**result.metrics, **summary}))


if __name__ == "__main__":
    run_command(main)
