"""Scores: benchmark tasks and MT-Bench."""
