"""The one exception that a user can cause, by an argument, a file, what lies in a directory.

Any public function may raise it. Docstrings name only what is special: an `OSError`, a guarantee.
"""


class MiniloraError(ValueError):
    """Bad input or a bad file: says what was given, what is allowed, and what to do, in one line.

    The commands print it and exit with code 2. Our own mistakes are `AssertionError`.
    """
