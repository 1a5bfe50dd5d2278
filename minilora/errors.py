"""The one exception that a user can cause.

Any public function may raise it: for an argument, for a file, for what lies in a directory. Their
docstrings do not repeat that; they name only what is special, such as an `OSError` or a guarantee.
"""


class MiniloraError(ValueError):
    """Bad input or a bad file: says what was given, what is allowed, and what to do, in one line.

    The commands print it and exit with code 2. Our own mistakes are `AssertionError`.
    """
