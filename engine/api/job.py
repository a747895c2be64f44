"""A request that passed every check and is not in the engine yet. No JAX here."""

from dataclasses import dataclass, replace

from ..chat.answers import AnswerFormat
from ..protocol.sampling_plan import SamplingPlan
from ..protocol.service import DEFAULT, Service
from ..structured.grammar import Grammar
from .prompts import Prompt
from .sampling_params import SamplingParams


@dataclass(frozen=True, eq=False)
class Job:
    """What is made of a request once; the plan's seed is still to come."""

    prompt: Prompt
    params: SamplingParams
    plan: SamplingPlan
    arrival: float  # when it reached us, before it was tokenised; in seconds on the engine's clock
    service: Service = DEFAULT
    tokenised: float | None = None  # when it was checked; None: on arrival
    grammar: Grammar | None = None  # what its answers keep to; None: nothing
    answers: AnswerFormat | None = None  # the format by which its answers are read into parts; None: they are not
    scored_from: int | None = None  # of a scored prompt, the first token whose score is wanted; None: the second
    alternatives: tuple[int, ...] = ()  # what else is scored in the place of its last token
    name: str | None = None  # what ids of its answers' calls are made of; None: of the request's number

    def served(self, service: Service) -> "Job":
        """Return the same job, to be served in this way."""
        return self if service is self.service else replace(self, service=service)
