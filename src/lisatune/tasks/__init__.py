"""Scores on tasks of lm-evaluation-harness: local_data, harness, scores, record, before_after, in that order."""
