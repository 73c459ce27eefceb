"""Progress: what is being done, how many images a second, how much time is left."""

import math
import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm

from fgm import process_rank


class Lines:
    """stdout for tqdm where stderr is no terminal and has errors alone: every report is its own line."""

    def write(self, text):
        if text.strip():
            sys.stdout.write(f"{text.strip()}\n")

    def flush(self):
        sys.stdout.flush()


@contextmanager
def bar(what, total=None, done=0, unit="images"):
    """A tqdm bar of the first process, to update(n) as images are done; without a total it shows the time.

    what: "scoring", for instance; None: no bar. A thread redraws it every second, however long a call within
    takes; where stderr is no terminal it prints a line a minute."""
    terminal = sys.stderr.isatty()
    shown = tqdm(desc=what, total=total, initial=done, unit=f" {unit}", unit_scale=True,
                 disable=what is None or process_rank() > 0, file=None if terminal else Lines(),
                 mininterval=math.inf, bar_format=None if total else "{desc}: {elapsed}")
    finished = threading.Event()

    def redraw():
        while not finished.wait(1 if terminal else 60):
            shown.refresh()

    thread = threading.Thread(target=redraw, daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        finished.set()
        thread.join()
        shown.close()


def batches(total, size, what):
    """range(0, total, size) with the progress bar `what`."""
    with bar(what, total) as shown:
        for begin in range(0, total, size):
            yield begin
            shown.update(min(size, total - begin))
