#!/usr/bin/env bash
# The documentation as a site in out/site, strictly: a page that is missing, a link that leads nowhere or a name that the
# reference cannot find is an error. Needs Python 3.12; no network once the packages are installed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
[ $# -eq 0 ] || die "docs.sh takes no arguments."

setup_venv '[docs]'
link_package
cd "$root"
"$python" -m mkdocs build --strict --quiet --config-file .mkdocs.yml
echo "Open out/site/index.html."
