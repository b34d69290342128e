"""What everything stands on: files, amounts, progress, signals. Needs no torch."""
