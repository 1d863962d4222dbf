#!/usr/bin/env bash
# This repository's own figures of SmolLM2-135M (benchmarks/RESULTS.md): a real language model, small enough for a laptop.
# tools/fetch_smollm2.py makes the folder. Further arguments go to compare.py: --rows ablation takes best apart.
set -euo pipefail
MODELS=${MODELS:-smollm2-135m}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ "$MODELS" != smollm2-135m ] || [ -d smollm2-135m ] || echo "smollm2-135m is not here; python tools/fetch_smollm2.py makes it" >&2
compare_models smollm2 --eval_ppl --seqlen 1024 --nsamples 16 --limit 8 --rows full rtn hadamard paper best "$@"
