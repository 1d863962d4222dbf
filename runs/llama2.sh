#!/usr/bin/env bash
# Table 1: perplexity of Llama-2 on WikiText-2 and C4. Llama-1 too: MODELS=huggyllama/llama-7b. Further arguments go to
# compare.py: --rows full paper leaves out training, which takes most of the time.
set -euo pipefail
MODELS=${MODELS:-meta-llama/Llama-2-7b-hf meta-llama/Llama-2-13b-hf}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

compare_models llama2 --eval_ppl --test_dataset wikitext2 c4 --rows full paper paper_lwc best "$@"
