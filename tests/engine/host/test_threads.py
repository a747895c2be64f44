"""A thread of an engine is joined to its end, however often Ctrl-C comes meanwhile."""

import signal
import threading

from twinmesh.engine.host.threads import EngineThread


def press_ctrl_c():
    """Interrupt the main thread as a terminal does, whatever it waits for."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def ends_by_ctrl_c(thread):
    """Join a thread and press Ctrl-C meanwhile; return whether that is what ended the join."""
    presser, has_joined = threading.Timer(0.05, press_ctrl_c), False
    presser.start()
    try:
        thread.join(60)
        has_joined = True
        presser.join()
    except KeyboardInterrupt:
        presser.join()
    return not has_joined


def test_another_join_after_ctrl_c_waits_as_the_first_did():
    go_on, ended = threading.Event(), []
    thread = EngineThread(target=lambda: (go_on.wait(60), ended.append(True)), daemon=True)
    thread.start()
    assert [ends_by_ctrl_c(thread) for _ in range(3)] == [True] * 3
    assert not ended
    go_on.set()
    thread.join(60)
    assert ended


def test_a_join_ends_with_its_timeout():
    go_on = threading.Event()
    thread = EngineThread(target=go_on.wait, args=(60,), daemon=True)
    thread.start()
    thread.join(0.0)
    assert thread.is_alive()
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
