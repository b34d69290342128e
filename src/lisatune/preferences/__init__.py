"""A run of a task of TRL: rows, trainer, journal and checkpoints, and what it leaves behind."""
