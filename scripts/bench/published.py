"""Published figures of one GPU that `simulators.py` holds predictions against; none was measured by this project.

Read 2026-11 from the publishers' own pages. Compare like with like: precision, lengths and load differ by row. Left out
are figures whose lengths are those of a data set that the page does not sum up (ShareGPT, MLPerf's).
"""

from typing import Literal, NamedTuple


class Published(NamedTuple):
    """A figure and what it is of."""

    model: str
    device: str
    precision: Literal["bfloat16", "float8", "mxfp4"]  # of the weights
    prompt: int  # tokens of each request
    output: int
    requests: int  # in all
    concurrency: int  # at once; as many as requests: all are queued at the start
    figure: float
    unit: Literal["output tokens/s", "TPOT, ms"]
    by: str

    @property
    def name(self) -> str:
        """Return what it is of, in a line."""
        load = "queued at once" if self.concurrency == self.requests else f"{self.concurrency} at a time"
        return f"{self.model}, {self.device}, {self.precision}, {self.prompt}/{self.output}, {self.requests} {load}"


_LLAMA, _QWEN = "meta-llama/Meta-Llama-3.1-8B", "Qwen/Qwen3-8B"
_OSS_20B, _OSS_120B = "openai/gpt-oss-20b", "openai/gpt-oss-120b"
_TRTLLM = "TensorRT-LLM performance page"
_GPUSTACK = "GPUStack performance lab, vLLM"


def _queued(model: str, device: str, prompt: int, output: int, requests: int, figure: float) -> Published:
    precision: Literal["float8", "mxfp4"] = "mxfp4" if "gpt-oss" in model else "float8"
    return Published(model, device, precision, prompt, output, requests, requests, figure, "output tokens/s", _TRTLLM)


def _at_a_time(concurrency: int, figure: float) -> Published:
    # The page has no lengths for these; at so few requests TPOT hardly depends on them.
    return Published(_QWEN, "h100", "bfloat16", 1000, 1000, 2 * concurrency, concurrency, figure, "TPOT, ms", _GPUSTACK)


# The page says 3,000 requests for 1000/1000 and 1,500 for 8k/1k of gpt-oss-20b; the others are taken to be like them.
PUBLISHED = (
    _queued(_LLAMA, "h100", 1024, 1024, 3000, 15_220),
    _at_a_time(1, 7.22),
    _at_a_time(2, 7.30),
    _at_a_time(4, 7.40),
    _at_a_time(8, 7.67),
    _queued(_OSS_20B, "h100", 1000, 1000, 3000, 11_557),
    _queued(_OSS_20B, "h100", 8192, 1024, 1500, 3_366),
    _queued(_OSS_20B, "h100", 1024, 8192, 1500, 8_617),
    _queued(_OSS_20B, "h200", 1000, 1000, 3000, 13_858),
    _queued(_OSS_120B, "h200", 1000, 1000, 3000, 6_868),
    _queued(_OSS_120B, "h200", 8192, 1024, 1500, 1_828),
)
