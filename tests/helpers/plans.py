"""Sampling plans of a few requests as the rows that the device plane keeps of them."""

from typing import NamedTuple

import numpy as np
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.sampling.request_rows import dense_row, scalars_of
from twinmesh.engine.sampling.request_state import DenseRows, Scalars


class Case(NamedTuple):
    """One request about to draw its next token."""

    plan: SamplingPlan
    prompt: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @property
    def position(self):
        return len(self.prompt) + len(self.outputs)


def greedy(**features):
    return SamplingPlan(temperature=0.0, seed=0, **features)


def stack(cases, vocabulary):
    """Stack scalars, dense rows and positions of the cases, one row each."""
    numbers = [scalars_of(case.plan, len(case.prompt)) for case in cases]
    rows = [dense_row(case.plan, np.array(case.prompt, np.int32), case.outputs, vocabulary) for case in cases]
    return (
        Scalars(*(np.stack(x) for x in zip(*numbers, strict=True))),
        DenseRows(*(np.stack(x) for x in zip(*rows, strict=True))),
        np.array([case.position for case in cases], np.int32),
    )
