"""Slices: every matrix of the model is cut into blocks of rows, and an interval trains one block of each."""
