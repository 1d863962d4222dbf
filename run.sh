#!/usr/bin/env bash
# W4A4 DuQuant, without training.
#
#   bash run.sh                                     the bundled model, beside other ways to quantize it (compare.py)
#   MODEL=meta-llama/Llama-2-7b-hf bash run.sh      the paper's experiment (main.py)
#   bash run.sh --report                            the bundled model alone, with the report on it (main.py)
#   bash run.sh --wbits 8 --abits 8                 further arguments go to that script, and win
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh

settings=(--preset paper --eval_ppl)

bundled=(--model assets/tiny-llama --calib_dataset assets/stories/calibration.txt --test_dataset assets/stories/test.txt
    --seqlen 512 --tasks stories_qa)

if [ -n "${MODEL:-}" ]; then
    exec "$PYTHON" main.py --model "$MODEL" --calib_dataset wikitext2 --test_dataset wikitext2 "${settings[@]}" "$@"
elif [[ " $* " == *" --report"* ]]; then
    exec "$PYTHON" main.py "${bundled[@]}" "${settings[@]}" "$@"
fi
exec "$PYTHON" compare.py "${bundled[@]}" "${settings[@]}" --rows full rtn smooth hadamard dual best "$@"
