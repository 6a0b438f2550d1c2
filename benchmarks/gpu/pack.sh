#!/usr/bin/env bash
# Puts into .gpu/ what a machine without a network needs beside the checkout to run benchmarks/gpu/run.sh.
#   benchmarks/gpu/pack.sh [OPTIONS]              see: benchmarks/gpu/pack.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python3}" -P benchmarks/mtdiffusion_benchmarks/gpu/kit.py pack "$@"
