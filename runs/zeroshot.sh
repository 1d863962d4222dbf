#!/usr/bin/env bash
# Tables 2 and D1: zero-shot accuracy on the six tasks of the paper. Further arguments go to compare.py:
# --task_data_dir DIR reads the tasks from files.
set -euo pipefail
MODELS=${MODELS:-meta-llama/Llama-2-7b-hf meta-llama/Llama-2-13b-hf}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

compare_models zeroshot --tasks piqa arc_easy arc_challenge boolq hellaswag winogrande \
    --rows full paper paper_lwc best "$@"
