#!/usr/bin/env bash
# transformers 5.24.0: a config.json with `rope_parameters` and the `rope_scaling` that model cards tell people to add loses its
# rope_theta: the latter replaces the former whole, and the base falls back to 10,000 without an error.
#
# Seen on 2026-11-29:
#   as found: rope_parameters with a base of 500,000: 500000.0
#   as found: and rope_scaling beside them: 10000.0
#   as found: the base as rope_theta, and rope_scaling: 500000.0
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare transformers==5.24.0 -- "$@"
run_python <<'PY'
import json
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
from finding import expect
from transformers import AutoConfig

folder = tempfile.mkdtemp()
BASE = {"rope_type": "default", "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def theta(**settings):
    config = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1} | settings
    with open(folder + "/config.json", "w") as file:
        json.dump(config, file)
    return AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"]


alone, both = theta(rope_parameters=BASE), theta(rope_parameters=BASE, rope_scaling=YARN)
flat = theta(rope_theta=500000.0, rope_scaling=YARN)
expect(alone == 500000, f"rope_parameters with a base of 500,000: {alone}")
expect(both == 10000, f"and rope_scaling beside them: {both}")
expect(flat == 500000, f"the base as rope_theta, and rope_scaling: {flat}")
PY
