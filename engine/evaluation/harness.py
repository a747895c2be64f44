"""The model class of lm-evaluation-harness 0.4.13 over an engine: `twinmesh` by name, once this is imported.

    lm = TwinmeshLM("smollm2", {"dtype": "float32"})
    results = lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

It needs the package of the extra `eval`. The engine batches by itself: the harness's batch size means nothing to it.
Contexts that begin alike, as those of few shots and of multiple choices do, are computed once where the prefix cache is
on. Text only, one process.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ...models.errors import ChatTemplateError
from ..api.llm import LLM
from .requests import Asked, Scored, answer_of, asked, scored

NAME = "twinmesh"
_LOGGER = logging.getLogger(__name__)
# Requests that are given to the engine together: its queue is filled, and the harness's cache has results meanwhile.
_TOGETHER = 512
_OWN = ("add_bos_token", "prefix_token_id", "max_gen_toks", "max_length", "think_end_token", "chat_template_args")


@register_model(NAME)
class TwinmeshLM(TemplateLM):
    """A model on an engine, for the harness.

    Args:
        model: an engine, or a model's name or path, for which one is started; it is closed with this object.
        engine: the options of the engine that is started.
        add_bos_token: whether texts get BOS in front; None: as the tokenizer does.
        prefix_token_id: stands before a text that has no context; None: BOS, or EOS where there is none.
        max_gen_toks: the most tokens of an answer, where a task does not say.
        max_length: how many tokens the model sees; None: as many as fit the engine, max_model_len - 2.
        think_end_token: text that ends the thinking, which is taken off answers with all before it.
        chat_template_args: variables of the chat template.

    Raises:
        ValueError: as `LLM` does, or options of an engine that runs already.
    """

    def __init__(
        self,
        model: LLM | str | Path,
        engine: Mapping[str, Any] | None = None,
        *,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        think_end_token: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, LLM) and engine:
            raise ValueError(f"engine={dict(engine)!r} comes too late for an engine that runs: give it to LLM.")
        self.llm = model if isinstance(model, LLM) else LLM(model, **(engine or {}))
        self.tokenizer = self.llm.tokenizer
        fits = self.llm.config.max_model_len - 2  # the last token is predicted, and a place stays for one more
        if max_length is not None and not 1 <= max_length <= fits:
            raise ValueError(f"max_length={max_length!r} must be from 1 to {fits}, as max_model_len is {fits + 2}.")
        self.max_length, self.max_gen_toks = max_length or fits, max_gen_toks
        self._add_bos, self._prefix, self._think_end = add_bos_token, prefix_token_id, think_end_token
        self._chat_variables = dict(chat_template_args or {})

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """Make one of `--model_args`: this class's own arguments by name, and the engine's options.

        What the harness adds says nothing here: batch sizes, and the device "cuda:0" whatever there is.
        """
        given = dict(arg_dict)
        model = given.pop("model", None) or given.pop("pretrained", None)
        if model is None:
            raise ValueError("model_args names no model: give model=smollm2, or a path.")
        own = {name: given.pop(name) for name in _OWN if name in given}
        # JSON has no tuples, such as buckets are.
        engine = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return cls(model, engine, **own)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """Make one of "model=smollm2,dtype=float32"; else as `create_from_arg_obj`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a text."""
        found = self.tokenizer.eos_token_id
        return found if found is not None else min(self.tokenizer.eos_token_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        """Return the id that stands before a text without context."""
        if self._prefix is not None:
            return int(self._prefix)
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Return the model's name, by which the harness keeps prompts that it has rendered."""
        return str(self.llm.engine.chat_template.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Convert a text to ids, with BOS as the model has it, unless it begins with that."""
        is_special = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False) or "\0"
        ):
            is_special = False
        return self.tokenizer.encode(string, add_special=True if is_special is None else is_special)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as text; without its system message where the template refuses that."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.llm.engine.chat_template.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                chat_template_kwargs=self._chat_variables,
            )

        try:
            return render(chat_history)
        except ChatTemplateError:
            plain = [message for message in chat_history if message["role"] != "system"]
            if len(plain) == len(chat_history):
                raise
            _LOGGER.warning("The chat template refuses a system message, which is left out.")
            return render(plain)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the template that the harness asks for, which it writes into results."""
        known = self.llm.engine.chat_template.templates
        if chat_template is False or chat_template is None:
            return None
        name = "default" if chat_template is True or len(known) < 2 else chat_template
        if known and name not in known:
            raise ValueError(f"There is no chat template {name!r}: the model has {', '.join(sorted(known))}.")
        return known.get(name)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of the length that the model sees."""
        texts = [request.args[0] for request in requests]
        windows = [list(self._windows(text)) for text in texts]
        found = iter(
            self._loglikelihood_tokens(
                [(None, *window) for of_text in windows for window in of_text], disable_tqdm=disable_tqdm
            )
        )
        totals = []
        for text, of_text in zip(texts, windows, strict=True):
            totals.append(sum(next(found)[0] for _ in of_text))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        return map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ),
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Score continuations: their log-likelihood, and whether greedy decoding gives them."""
        jobs = [scored(context, continuation, self.max_length) for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(jobs)
        order = sorted(range(len(jobs)), key=lambda index: jobs[index].tokens)
        with tqdm(total=len(jobs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for block in _blocks(order):
                for index, answer in zip(block, self._scores([jobs[index] for index in block]), strict=True):
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(block))
        return answers

    def _scores(self, jobs: Sequence[Scored]) -> list[tuple[float, bool]]:
        scores = self.llm.score([job.context for job in jobs], [job.continuation for job in jobs])
        return [(score.total, score.is_greedy) for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers to contexts, until a text that the task names, EOS, or so many tokens."""
        known: dict[str, Asked] = {}
        jobs = []
        for request in requests:
            context, given = request.args
            key = repr(given)
            if key not in known:
                known[key] = asked(given, self.tokenizer, self.max_gen_toks)
            jobs.append((self._prompt(context, known[key].max_tokens), known[key].params))
        answers = [""] * len(jobs)
        with tqdm(total=len(jobs), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for index, output in self.llm.as_completed(jobs, window=_TOGETHER):
                if output.error is not None:
                    raise RuntimeError(output.error)
                context, given = requests[index].args
                until = known[repr(given)].until
                answers[index] = answer_of(output.outputs[0].text, until, self._think_end)
                self.cache_hook.add_partial("generate_until", (context, given), answers[index])
                bar.update(1)
        return answers

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """Tokenise a context, and cut it from the left so that an answer fits behind it."""
        room = self.max_length - max_tokens
        if room < 1:
            raise ValueError(
                f"A task asks for answers of {max_tokens} tokens, and the model sees {self.max_length}: raise "
                "max_model_len, or give --gen_kwargs max_gen_toks=N."
            )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]


def _blocks(order: Sequence[int]) -> Iterable[Sequence[int]]:
    return (order[start : start + _TOGETHER] for start in range(0, len(order), _TOGETHER))
