"""After training: what `train` wrote, opened, scored, used, merged, looked at."""
