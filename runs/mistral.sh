#!/usr/bin/env bash
# Table D6: perplexity of Mistral-7B on WikiText-2 and C4. Further arguments go to compare.py.
set -euo pipefail
MODELS=${MODELS:-mistralai/Mistral-7B-v0.1}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

compare_models mistral --eval_ppl --test_dataset wikitext2 c4 --rows full rtn paper best "$@"
