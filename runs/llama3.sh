#!/usr/bin/env bash
# Table 5: perplexity and tasks of Llama-3-8B. Further arguments go to compare.py.
set -euo pipefail
MODELS=${MODELS:-meta-llama/Meta-Llama-3-8B}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

compare_models llama3 --eval_ppl --test_dataset wikitext2 c4 ptb \
    --tasks piqa arc_easy arc_challenge boolq hellaswag winogrande --rows full paper paper_lwc best "$@"
