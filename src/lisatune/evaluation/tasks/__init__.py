"""Scores on tasks of lm-evaluation-harness: local_data, harness, score, scorer, record, before_after, in that order."""
