"""How a test waits: for the event itself, with a limit that only a hang can reach."""

import signal
import subprocess
import time
from contextlib import contextmanager

# a test's slowest process takes seconds, and minutes on a machine that has ten times as much to do as it can
HANG_SECONDS = 30 * 60


def wait_until(happened, process=None, pause=0.01):
    """Return when ``happened()`` is true, looked at every ``pause`` seconds; fail if ``process`` ends or it hangs."""
    limit = time.monotonic() + HANG_SECONDS
    while not happened():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it hangs"
        time.sleep(pause)


def heed_ctrl_c():
    """A shell that starts the tests in the background makes them, and all that they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(words, preexec_fn=heed_ctrl_c, **options):
    """A process that ends with the test, even one that fails; it would be another test's ResourceWarning otherwise."""
    words = [str(word) for word in words]
    with subprocess.Popen(words, text=True, preexec_fn=preexec_fn, **options) as process:
        try:
            yield process
        finally:
            process.kill()
