#!/usr/bin/env bash
# Everything that has to pass: installs into .venv, fetches two small models, then lints, checks types and tests.
# Needs Python 3.12 and no GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
[ $# -eq 0 ] || die "test.sh takes no arguments; for some of the tests run .venv/bin/pytest with what you like."

setup_venv '[test]'
link_package
cd "$root"

# What the tests need besides comes over the network meanwhile.
(
    setup_h100
    twinmesh fetch smollm2
    twinmesh fetch gemma3-270m
) &
fetching=$!
trap 'kill "$fetching" 2>/dev/null || true' EXIT

echo "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "mypy"
"$python" -m mypy
wait "$fetching"
echo "pytest"
# Each worker gets tests that stand together, which share what they are set up with.
"$python" -m pytest -n 2 --dist worksteal --durations=30
