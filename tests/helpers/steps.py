"""Being there between two steps of a run: ``Run.batches`` is what the loop iterates over."""

from lisatune.run.build import Run


def before_each_step(action, batches=Run.batches):
    """``batches``, but ``action(step)`` is called before each step begins; steps are counted from 0."""

    def watched(*args):
        for step, batch, position in batches(*args):
            action(step)
            yield step, batch, position

    return watched
