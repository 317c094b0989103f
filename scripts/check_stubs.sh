#!/usr/bin/env bash
# Fails when services/paceline/v1 is not what proto/ generates.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
scripts/generate_stubs.sh "$fresh"
diff -r --exclude=__init__.py --exclude=__pycache__ "$fresh/paceline/v1" services/paceline/v1
