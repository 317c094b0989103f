#!/usr/bin/env bash
# Regenerates services/paceline/v1 from proto/. The folder under proto/ repeats the package
# path, so the generated imports are right as they stand.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-services}"
mkdir -p "$out"
.venv/bin/python -m grpc_tools.protoc --proto_path=proto --python_out="$out" --pyi_out="$out" \
  --grpc_python_out="$out" proto/paceline/v1/*.proto
