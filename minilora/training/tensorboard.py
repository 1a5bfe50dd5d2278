"""The rows of a run's log as curves, under the names of HF's callback: `tensorboard --logdir OUT`.

What goes wrong with them is said, and training goes on without them, the same to the last bit.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.errors import MiniloraError, first_line
from minilora.files import json_text
from minilora.training import distributed
from minilora.training.metrics_file import read_rows
from minilora.training.progress import say
from minilora.training.record import RunRecord


class Curves:
    """What `report_to` asks for, in the run's directory; of several processes the first writes."""

    def __init__(self, output_dir: Path, record: RunRecord) -> None:
        self.path, self.record = output_dir / "runs", record  # as Trainer's
        self.is_on, self.writer = record.arguments.report_to != "none", None
        if self.is_on and find_spec("tensorboard") is None:
            raise MiniloraError('report_to needs pip install "minilora[tensorboard]"')

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; before the first, all that metrics.jsonl has: what a run showed before it was
        resumed is purged, so that nothing is there twice.
        """
        if not self.is_on or distributed.rank() > 0:
            return
        try:
            rows = [row]
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.path), purge_step=0)
                rows = [*read_rows(self.path.parent), row]
                arguments = json_text(self.record.to_json(), indent=2)
                self.writer.add_text("args", f"```\n{arguments}\n```")
            for row in rows:
                evaluated = {f"eval/{n[5:]}": row[n] for n in row if n.startswith("eval_")}
                trained = {f"train/{name}": row[name] for name in row if name != "step"}
                for tag, value in (evaluated or trained).items():
                    # In the file null stands for NaN.
                    self.writer.add_scalar(tag, math.nan if value is None else value, row["step"])
            self.writer.flush()
        except Exception as error:  # no curve is worth a run
            self.is_on = False
            say(f"warning: {self.path} cannot be written ({first_line(error)}): no more curves")
