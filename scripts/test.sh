#!/usr/bin/env bash
# Everything that has to pass: installs into .venv, fetches two small models, then lints, checks types and tests.
# Needs Python 3.12 and no GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
[ $# -eq 0 ] || die "test.sh takes no arguments; for some of the tests run .venv/bin/pytest with what you like."

setup_venv '[test]'
setup_h100
twinmesh fetch smollm2
twinmesh fetch gemma3-270m
link_package
cd "$root"

echo "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "mypy"
"$python" -m mypy
echo "pytest"
"$python" -m pytest -n 2 --durations=30
