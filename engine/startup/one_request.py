"""An engine for one request, as `twinmesh generate` starts it: one slot, and only the programs that it can come to.

Invariant: a request gets the sizes of steps, and so the bits, that an engine for many would give it if it were alone
there. The scheduler never asks for a size that is not among the configuration's, so what is left out is never missed,
also when a mesh is lost and the request starts over. Two requests at once are no use to such an engine: they take
turns, and what only they would need is not there.
"""

from dataclasses import dataclass, replace

from ..config import EngineConfig, bucket_for
from ..protocol.sampling_plan import SamplingPlan
from ..sampling.request_rows import Stage, stages_of
from ..worker.programs import Job


@dataclass(frozen=True)
class OneRequest:
    """What is known of a request before an engine is started for it alone; it wants no prompt log-probabilities."""

    prompt_tokens: int
    max_tokens: int
    plan: SamplingPlan

    def narrow(self, config: EngineConfig) -> EngineConfig:
        """Leave one slot, and the size of step in which one request decodes."""
        return replace(config, max_num_seqs=1, decode_buckets=config.decode_buckets[:1])

    def narrow_prefill(self, config: EngineConfig) -> EngineConfig:
        """Leave the sizes in which the prompt is prefilled. Pools are sized before, the same for every prompt."""
        chunks, rest = divmod(self.prompt_tokens, config.chunk_size)
        lengths = ([config.chunk_size] if chunks else []) + ([rest] if rest or not chunks else [])
        sizes = sorted({bucket_for(length, config.prefill_buckets) for length in lengths})
        return replace(config, prefill_buckets=tuple(sizes))

    def needs(self, config: EngineConfig, job: Job) -> bool:
        """Return whether an engine of this narrowed configuration may run the program."""
        stages = stages_of(self.plan)
        match job.kind:
            case "score" | "copy_page":  # of prompt tokens, and for completions that share a prompt
                return False
            case "load_dense":
                return Stage.ADJUST in stages
            case "sample":
                return job.size[0] in stages
            case "gather" | "scatter":
                tokens = min(self.prompt_tokens + self.max_tokens, config.max_model_len)
                return int(job.size[1]) <= bucket_for(config.pages_for(tokens), config.handoff_buckets)
        return True
