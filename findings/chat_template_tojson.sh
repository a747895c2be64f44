#!/usr/bin/env bash
# jinja2 3.1.6 with transformers 5.24.0: chat templates call `tojson` on tools, and jinja2's own is another function than the one that
# transformers puts in its place: it sorts keys and writes <, &, ' as \u003c, \u0026, \u0027. A template rendered by plain jinja2
# gives the model another prompt.
#
# Seen on 2026-11-29:
#   as found: jinja2: [{"function": {"description": "is a \u003c b", "name": "less"}, "type": "function"}]
#   as found: transformers: [{"type": "function", "function": {"name": "less", "description": "is a < b"}}]
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare transformers==5.24.0 jinja2==3.1.6 tokenizers==0.23.3 -- "$@"
run_python <<'PY'
import jinja2
from finding import expect
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tool = {"type": "function", "function": {"name": "less", "description": "is a < b"}}
template = "{{ tools | tojson }}"
plain = jinja2.Environment().from_string(template).render(tools=[tool])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
tokenizer.chat_template = template
real = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tools=[tool], tokenize=False)
expect(r"\u003c" in plain and plain.index("description") < plain.index("name"), f"jinja2: {plain}")
expect("<" in real and real.index("name") < real.index("description"), f"transformers: {real}")
PY
