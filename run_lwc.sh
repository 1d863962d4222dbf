#!/usr/bin/env bash
# W4A4 DuQuant with trained weight clipping, by main.py. Its first line says on which model:
#
#   bash run_lwc.sh                                     the bundled model
#   MODEL=meta-llama/Llama-2-7b-hf bash run_lwc.sh      that model: the paper's experiment
#   bash run_lwc.sh --epochs 5                          further arguments go to main.py, and win
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -n "${MODEL:-}" ]; then
    echo "MODEL=$MODEL: the paper's experiment with trained clipping on it"
    data=(--model "$MODEL" --calib_dataset wikitext2 --test_dataset wikitext2)
else
    echo "no MODEL is set: trained clipping on the bundled model"
    data=(--model assets/tiny-llama --calib_dataset assets/stories/calibration.txt
        --test_dataset assets/stories/test.txt --seqlen 512 --nsamples 32)
fi

source tools/environment.sh
exec "$PYTHON" main.py "${data[@]}" --preset paper_lwc --eval_ppl "$@"
