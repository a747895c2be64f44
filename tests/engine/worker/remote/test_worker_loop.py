"""What a worker performs of what it is sent, and what it says where something raises or cannot be read."""

from queue import SimpleQueue

import numpy as np
import pytest
from twinmesh.engine.errors import EngineError
from twinmesh.engine.protocol import wire
from twinmesh.engine.protocol.actions import Decode, DropTransfer, Finish, ResetMesh, Scatter, StartTransfer
from twinmesh.engine.protocol.events import TransferFailed
from twinmesh.engine.protocol.results import MeshLost, StepFailed
from twinmesh.engine.protocol.worker import NewParams, Refused, Turn
from twinmesh.engine.worker.remote.outbox import Outbox
from twinmesh.engine.worker.remote.worker_loop import WorkerLoop, as_message

EPOCH = 4
BOOM = RuntimeError("boom")
STEP, OTHER = Decode(2, 1, 4, 1, ()), Decode(5, 2, 4, 1, ())
SEND, TAKE = StartTransfer(8, 1, 2, 0, ((),), 5), Scatter(9, 2, 0, ((),))


class Executor:
    numbers = (2, 5)

    def __init__(self, failing=(), error=BOOM):
        self.performed, self.failing, self.error, self.params = [], failing, error, {}

    def perform(self, command):
        if isinstance(command, self.failing):
            raise self.error
        self.performed.append(command)

    def replace_params(self, new):
        self.params |= new


def run(executor, *work, prepare_masks=lambda: pytest.fail("nobody asked for masks")):
    """Perform this; return what the driver hears: completions, and other messages."""
    inbox, heard = SimpleQueue(), []
    for one in (*work, None):
        inbox.put(one)
    outbox = Outbox(EPOCH, lambda data: heard.append(wire.decode_from_worker(data)), lambda: 1.0)
    WorkerLoop(EPOCH, inbox, outbox, executor, lambda: 1.0, prepare_masks).run()
    assert all(message.epoch == EPOCH for message in heard)
    return [part for message in heard for part in getattr(message, "completions", (message,))]


def turn(*commands, epoch=EPOCH):
    return Turn(epoch, commands)


def test_commands_are_performed_in_order_and_those_of_another_epoch_are_not():
    executor = Executor()
    assert run(executor, turn(STEP, OTHER), turn(STEP, epoch=3), turn(SEND)) == []
    assert executor.performed == [STEP, OTHER, SEND]


def test_what_raises_costs_its_mesh_and_what_follows_there_is_left_out_until_it_is_reset():
    executor = Executor(failing=Decode)
    heard = run(executor, turn(STEP, SEND, TAKE, Finish(1, "stop"), ResetMesh(2), SEND))
    assert [type(one) for one in heard] == [MeshLost, TransferFailed]
    assert (heard[0].mesh, heard[0].reason) == (2, "RuntimeError: boom")
    assert heard[1].transfer == 8
    assert executor.performed == [DropTransfer(9), Finish(1, "stop"), ResetMesh(2), SEND]


def test_a_transfer_that_raises_fails_alone():
    executor = Executor(failing=StartTransfer)
    assert run(executor, turn(SEND, STEP)) == [TransferFailed(1.0, 8, "RuntimeError: boom")]
    assert executor.performed == [STEP]


def test_what_cannot_be_read_costs_all_meshes_until_they_are_reset():
    executor = Executor()
    heard = run(executor, wire.WireError("the message is damaged."), turn(STEP, ResetMesh(5), OTHER))
    assert [one.mesh for one in heard] == [2, 5]
    assert "could not read what it was sent: the message is damaged." in heard[0].reason
    assert executor.performed == [ResetMesh(5), OTHER]


@pytest.mark.parametrize(
    ("failing", "error", "why"),
    [(Decode, EngineError("a file was changed."), "a file was changed."), (Finish, RuntimeError("boom"), "it failed")],
)
def test_what_no_mesh_is_to_blame_for_ends_the_worker_in_a_sentence(failing, error, why):
    (refused,) = run(Executor(failing, error), turn(STEP, Finish(1, "stop")), turn(OTHER))
    assert isinstance(refused, Refused)
    assert refused.why.startswith(why)


def test_new_parameters_arrive_as_they_were_sent():
    import ml_dtypes

    executor, sent = Executor(), np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    message = wire.decode_to_worker(wire.encode(NewParams(EPOCH, {"w": as_message(sent)})))
    run(executor, message)
    assert executor.params["w"].dtype == sent.dtype
    assert (executor.params["w"] == sent).all()


def test_what_several_threads_post_at_once_is_sent_at_once():
    sent = []

    def send(data):
        if not sent:  # others post while this one sends
            sent.append(None)
            for step in range(3):
                outbox.post(StepFailed(0.0, 2, step, "boom"))
        sent.append(wire.decode_from_worker(data))

    outbox = Outbox(EPOCH, send, lambda: 1.0)
    outbox.post(StepFailed(0.0, 2, 9, "boom"))
    assert [[one.step for one in message.completions] for message in sent[1:]] == [[9], [0, 1, 2]]
