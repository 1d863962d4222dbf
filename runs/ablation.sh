#!/usr/bin/env bash
# Table 6: what the parts of DuQuant buy (the last comparison is without smoothing), and those of the preset best.
# Further arguments go to compare.py.
set -euo pipefail
MODELS=${MODELS:-meta-llama/Llama-2-7b-hf meta-llama/Llama-2-13b-hf}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

compare_models ablation --eval_ppl --test_dataset wikitext2 c4 --rows smooth rotation rotation_permutation dual ablation "$@"
compare_models ablation --eval_ppl --test_dataset wikitext2 c4 --no_smooth "$@" --rows dual
