#!/usr/bin/env bash
# From a fresh clone to real text: installs into .venv, fetches a small model, and answers about thirty prompts with
# prefill on one CPU device and decode on another. Needs Python 3.12 and no GPU. Running it again is quick.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
[ $# -eq 0 ] || die "quickstart.sh takes no arguments; 'twinmesh batch --help' explains the command it runs."

# Otherwise JAX warns where there is a GPU that it was not installed for.
export JAX_PLATFORMS=cpu

setup_venv ''
twinmesh fetch smollm2
mkdir -p "$root/out"
cd "$root"
echo "Answering $(grep -c . scripts/quickstart_prompts.jsonl) prompts, prefill on one CPU device and decode on another ..."
twinmesh batch --model smollm2 --topology prefill=1,decode=1 --max-model-len 2048 \
    --input scripts/quickstart_prompts.jsonl --output out/quickstart.jsonl --restart --show 6
echo
echo "Now try:"
echo "  .venv/bin/twinmesh generate --model smollm2 --chat --prompt 'What is a glacier? Answer in one sentence.'"
