"""The one exception type a user of minilora can cause, and nothing else."""


class MiniloraError(ValueError):
    """Bad input or a bad file: says what was found, what is allowed, and what to do.

    The commands print it as one line and exit with code 2. Our own mistakes stay `AssertionError`.
    """
