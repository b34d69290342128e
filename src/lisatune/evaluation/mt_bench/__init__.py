"""MT-Bench: questions, records, answers, endpoint, verdicts, judge, scores, evaluation, in that order."""
