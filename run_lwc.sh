#!/usr/bin/env bash
# W4A4 DuQuant with learned weight clipping.
#
#   bash run_lwc.sh                                     the bundled model
#   MODEL=meta-llama/Llama-2-7b-hf bash run_lwc.sh      the paper's experiment
#   bash run_lwc.sh --epochs 5                          further arguments go to main.py, and win
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh

if [ -z "${MODEL:-}" ]; then
    data=(--model assets/tiny-llama --calib_dataset assets/stories/calibration.txt --test_dataset assets/stories/test.txt
        --seqlen 512 --nsamples 32)
else
    data=(--model "$MODEL" --calib_dataset wikitext2 --test_dataset wikitext2)
fi

exec "$PYTHON" main.py "${data[@]}" --preset paper_lwc --eval_ppl "$@"
