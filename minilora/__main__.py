"""Every command under one name: `minilora COMMAND ...` is `python -m minilora.COMMAND ...`.

minilora train | evaluate | predict | merge | inspect | sweep | env
minilora COMMAND --help
minilora --version
"""

import importlib
import sys

from minilora import __version__
from minilora.command import run_command
from minilora.config_file import nearest
from minilora.errors import MiniloraError

COMMANDS = ("train", "evaluate", "predict", "merge", "inspect", "sweep", "env")


def main() -> None:
    run_command(_dispatch)


def _dispatch() -> int | None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--version", "-V"):
        print(f"minilora {__version__}")
    elif name in ("--help", "-h"):
        print((__doc__ or "").strip())
    elif name in COMMANDS:
        sys.argv = [f"minilora {name}", *sys.argv[2:]]
        return importlib.import_module(f"minilora.{name}").main()
    else:
        choices = f"give one of {', '.join(COMMANDS)}"
        raise MiniloraError(f"{name!r} is no command{nearest(name, COMMANDS)}; {choices}")


if __name__ == "__main__":
    main()
