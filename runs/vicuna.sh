#!/usr/bin/env bash
# Figure 3 and Table D5: MT-Bench answers of Vicuna v1.5, as FastChat keeps them. Add a judge with --judge_base_url and
# --judge_model; the paper judges pairs of models, so its figures stand beside no score. Arguments go to compare.py.
set -euo pipefail
MODELS=${MODELS:-lmsys/vicuna-7b-v1.5 lmsys/vicuna-13b-v1.5}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

compare_models vicuna --eval_mtbench --chat_format vicuna --rows full paper best "$@"
