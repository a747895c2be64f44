"""The threads that an engine owns."""

import threading


class EngineThread(threading.Thread):
    """A thread that an engine owns. It may meet a dropped engine when it collects garbage, and must not join others.

    It can be joined again after a join that Ctrl-C has interrupted: Python 3.12 takes a thread whose join was
    interrupted for ended, and a second one would return at once.
    """

    _has_run: threading.Event

    def start(self) -> None:
        """Start the thread."""
        self._has_run = threading.Event()
        super().start()

    def run(self) -> None:
        """Do what the thread is for."""
        try:
            super().run()
        finally:
            self._has_run.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, at most `timeout` seconds."""
        if self._has_run.wait(timeout):
            super().join(timeout)
