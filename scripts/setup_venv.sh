# Sourced by quickstart.sh, test.sh and docs.sh, never run: finds Python, makes .venv, installs this clone into it.
# It neither activates the environment nor touches anything outside the clone and pip's cache.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"
# A stranger's modules on these paths would come before ours.
unset PYTHONPATH PYTHONHOME

die() {
    echo "$*" >&2
    exit 1
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
    die "Python 3.12 or newer is needed, with its venv module, and neither python3.12 nor python3 nor python is that:" \
        "install it (on Debian and Ubuntu the packages are python3.12 and python3.12-venv)."
}

install() {
    "$python" -m pip --version || "$python" -m ensurepip || return # environments made by other tools may lack pip
    "$python" -m pip install --disable-pip-version-check --no-input --editable "$1"
}

# setup_venv EXTRAS: install the clone, editable, with these extras ('' or '[test]'), unless that is done already.
setup_venv() {
    local extras="$1" found stamp state
    cd "$root" # pyenv chooses Python by the folder's .python-version
    stamp="$venv/installed$extras.stamp"
    state="$root $(cksum <pyproject.toml)"
    # What was installed with the tests' extra serves without it as well.
    if is_new_enough "$python" && grep -qsxF "$state" "$stamp" "$venv/installed[test].stamp"; then
        return
    fi
    found="$(find_python)" || exit 1
    echo "Installing Twinmesh into .venv with $("$found" --version) (the first time takes a minute or two) ..."
    if ! is_new_enough "$python"; then
        "$found" -m venv --clear "$venv" || die "The environment .venv could not be made."
    fi
    if ! install "$root$extras" >"$venv/pip.log" 2>&1; then
        tail -n 20 "$venv/pip.log" >&2
        die "The installation failed; above is the end of .venv/pip.log."
    fi
    echo "$state" >"$stamp"
}

# link_package: the clone's folder may have any name; to mypy and the reference the package has to be a folder named twinmesh.
# It holds a link for each part: a link to the clone itself would hold .venv, and with it itself, 40 times over.
link_package() {
    local package="$venv/mypy/twinmesh" part
    rm -rf "$package"
    mkdir -p "$package"
    for part in "$root"/*.py "$root"/{py.typed,docs,engine,kernels_pallas,models,scripts}; do
        ln -s "$part" "$package/"
    done
}

# setup_h100: the compiler of jax's CUDA plugin, into a folder that only a subprocess of the tests puts on its path: where
# it is importable, JAX looks for a GPU. Without it (no such wheels for this platform) the tests that need it say so.
setup_h100() {
    local target="$venv/h100" jax stamp
    jax="$("$python" -c 'import importlib.metadata as m; print(m.version("jax"))')"
    stamp="$target/installed-$jax.stamp"
    [ -e "$stamp" ] && return
    echo "Installing the compiler for GPUs into .venv/h100 (about 650 MB; needs no GPU) ..."
    rm -rf "$target"
    if "$python" -m pip install --disable-pip-version-check --no-input --no-deps --target "$target" \
        "jax-cuda12-plugin==$jax" "jax-cuda12-pjrt==$jax" \
        nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-cupti-cu12 >"$venv/h100.log" 2>&1; then
        touch "$stamp"
    else
        rm -rf "$target"
        echo "It could not be installed (.venv/h100.log says why): the tests that compile for an H100 are skipped." >&2
    fi
}

twinmesh() {
    "$python" -m twinmesh.scripts.cli "$@"
}
