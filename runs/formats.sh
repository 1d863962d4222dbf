#!/usr/bin/env bash
# This repository's own table of number formats and transforms on SmolLM2-135M (docs/formats.md): the preset best, but for
# the transform, whose blocks are those of the format. tools/fetch_smollm2.py makes the folder; FORMATS="nvfp4" runs one.
# Further arguments go to compare.py.
set -euo pipefail
MODELS=${MODELS:-smollm2-135m}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

failed=0
for format in ${FORMATS:-mxfp4 nvfp4}; do
    size=16
    [ "$format" = nvfp4 ] || size=32
    flags=(--wformat "$format" --aformat "$format" --eval_ppl --eval_kl --seqlen 1024 --nsamples 16 --limit 8)
    compare_models formats "${flags[@]}" --lac none --swc none "$@" --rows rtn || failed=1
    compare_models formats "${flags[@]}" --preset best --block_size "$size" \
        --rows full smooth hadamard two_hadamard dual "$@" || failed=1
    compare_models formats "${flags[@]}" --preset best --block_size "$size" --lac block "$@" --rows hadamard || failed=1
done
exit "$failed"
