"""Ctrl-C that ends a text instead of a process.

One hard fact: an exception out of a signal handler could strike between two kernels and leave the threads of a team
at work, so the first Ctrl-C only sets a flag, which the loop over the pieces reads. A second one ends the process at once.
"""

import os
import signal
import threading

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Interrupts:
    """Within this block SIGINT sets `asked`; a second one ends the process with 130."""

    def __init__(self):
        self.asked = False
        self._former = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_):
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)

    def _handle(self, number, frame):
        if self.asked:
            os.write(2, b"\n")
            os._exit(INTERRUPTED)
        self.asked = True

    def check(self, *_):
        """A progress callback: raises KeyboardInterrupt where the engine is between two chunks."""
        if self.asked:
            raise KeyboardInterrupt
