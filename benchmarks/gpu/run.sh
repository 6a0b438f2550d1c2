#!/usr/bin/env bash
# Measures what only an NVIDIA GPU can tell, from a bare checkout: docs/benchmarks.md, "On a GPU".
#   benchmarks/gpu/run.sh [FOLDER] [OPTIONS]      see: benchmarks/gpu/run.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
kit=${MTDIFFUSION_GPU_KIT:-$PWD/.gpu}
"$python" -P benchmarks/mtdiffusion_benchmarks/gpu/kit.py unpack "$kit"
rooms=$PWD/core:$PWD/registry:$PWD/plugins:$PWD/engine:$PWD/benchmarks
export PYTHONPATH=$kit/site:$rooms${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" -m mtdiffusion_benchmarks.gpu --work "$kit/work" "$@"
