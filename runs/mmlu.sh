#!/usr/bin/env bash
# Tables 3 and D2: MMLU of Vicuna v1.5, 0- and 5-shot. MMLU_DATA names the folder with dev/ and test/. Further arguments
# go to compare.py.
set -euo pipefail
MODELS=${MODELS:-lmsys/vicuna-7b-v1.5 lmsys/vicuna-13b-v1.5}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

compare_models mmlu --eval_mmlu --mmlu_data_dir "${MMLU_DATA:-mmlu/data}" --rows full paper paper_lwc best "$@"
