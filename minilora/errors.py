"""The one exception that a user can cause, by an argument, a file, what lies in a directory.

Any public function may raise it. Docstrings name only what is special: an `OSError`, a guarantee.
"""

import re

# Escape sequences, a carriage return within a line, changes of direction.
CONTROL = re.compile(r"(?<!^)\r|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class MiniloraError(ValueError):
    """Bad input or a bad file: says what was given, what is allowed, and what to do, in one line.

    The commands print it and exit with code 2. Our own mistakes are `AssertionError`.
    """


def harmless(text: str) -> str:
    """What was read from a file, so that it shows, and does nothing to a terminal or a page."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
