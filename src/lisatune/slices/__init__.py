"""Slices: every matrix of the model is cut into blocks of rows or columns, and an interval trains one block of each."""
