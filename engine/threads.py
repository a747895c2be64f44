"""The threads that an engine owns."""

import threading


class EngineThread(threading.Thread):
    """A thread that an engine owns. It may meet a dropped engine when it collects garbage, and must not join others."""
