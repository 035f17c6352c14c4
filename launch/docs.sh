#!/usr/bin/env bash
# Builds the documentation as a site, and takes every warning for an error: bash launch/docs.sh [FOLDER]
#
# The site's first page is then FOLDER/index.html (default: build/site). Broken links between pages and to their
# headings are warnings of the generator's; `tests/docs_test.py` checks them too. Environment: PYTHON=, see setup.sh
site=${1:-build/site}
if [[ ${1:-/} != /* ]]; then site=$PWD/$1; fi  # set-up changes the current directory

source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

set_up docs
$python -m sphinx --fail-on-warning --keep-going --quiet -b html docs "$site"
echo "site: $(cd -- "$site" && pwd)/index.html"
