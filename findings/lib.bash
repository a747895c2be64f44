# shellcheck shell=bash
# Sourced by the findings, never run: packages in a temporary folder that is removed at the end, and a Python that runs there.
# It touches nothing outside that folder but pip's cache, and neither knows nor imports Twinmesh.

set -euo pipefail

die() {
    echo "$*" >&2
    exit 2
}

is_new_enough() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.12 python3 python; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.12 or newer is needed, with its venv module, and neither python3.12 nor python3 nor python is that."
}

# prepare PACKAGE==VERSION... -- ARGUMENTS: an environment with these packages, or with their newest versions.
prepare() {
    local wanted=() found
    while [ "$1" != -- ]; do
        wanted+=("$1")
        shift
    done
    shift
    case "$#:${1-}" in
        0:) ;;
        1:--newest) wanted=("${wanted[@]%%==*}") ;;
        *) die "A finding takes --newest (try the newest versions) or nothing, not '$*'." ;;
    esac
    unset PYTHONPATH PYTHONHOME XLA_FLAGS JAX_PLATFORMS
    cd "$(dirname "${BASH_SOURCE[0]}")" # pyenv chooses Python by the folder's .python-version
    found="$(find_python)" || exit 2
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
    trap 'exit 130' INT TERM
    export TMPDIR="$folder" JAX_PLATFORMS=cpu
    "$found" -m venv "$folder/venv"
    if ! "$folder/venv/bin/python" -m pip install --disable-pip-version-check --no-input "${wanted[@]}" \
        >"$folder/pip.log" 2>&1; then
        tail -n 20 "$folder/pip.log" >&2
        die "The packages could not be installed: ${wanted[*]}."
    fi
    write_helper "${wanted[@]%%==*}"
    cd "$folder"
}

# What every finding's Python begins with: `from finding import expect, seconds`.
write_helper() {
    cat >"$folder/finding.py" <<'PY'
import importlib.metadata
import sys
import time


def expect(holds, sentence):
    print("as found:" if holds else "CHANGED, no longer so:", sentence, flush=True)
    if not holds:
        sys.exit(1)


def seconds(run, times=5):
    """The shortest of several runs, after one that may compile."""
    run()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)


PY
    # pip refuses brackets and the like in no name that a finding uses, so names can be quoted as they are.
    printf 'print(*(f"{name} {importlib.metadata.version(name)}" for name in "%s".split()), sep=", ")\n' "$*" \
        >>"$folder/finding.py"
}

# fetch_o200k: the vocabulary that openai-harmony would download, from npm's js-tiktoken, and the variable that says where it is.
fetch_o200k() {
    command -v npm >/dev/null || die "npm is needed: it brings the vocabulary."
    { npm pack --silent js-tiktoken@1.0.21 && tar xzf js-tiktoken-1.0.21.tgz; } >"$folder/npm.log" 2>&1 ||
        die "npm could not bring js-tiktoken 1.0.21."
    "$folder/venv/bin/python" - <<'PY'
import json
import re

with open("package/dist/ranks/o200k_base.cjs") as file:
    lines = json.loads(re.search(r'"bpe_ranks":\s*("(?:[^"\\]|\\.)*")', file.read())[1]).splitlines()
with open("o200k_base.tiktoken", "w") as file:
    for line in filter(None, lines):
        _, start, *tokens = line.split(" ")
        file.writelines(f"{token} {rank}\n" for rank, token in enumerate(tokens, int(start)))
PY
    export TIKTOKEN_ENCODINGS_BASE="$folder"
}

# run_python: the program on standard input.
run_python() {
    "$folder/venv/bin/python" - || die "The finding does not hold with these versions: see above."
}
