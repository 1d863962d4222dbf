#!/usr/bin/env bash
# W4A4 DuQuant, without training. Its first line says which of the two it is:
#
#   bash run.sh                                     compares ways to quantize the bundled model (compare.py)
#   MODEL=meta-llama/Llama-2-7b-hf bash run.sh      runs the paper's experiment on that model (main.py)
#   bash run.sh --wbits 8 --abits 8                 further arguments go to that script, and win
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -n "${MODEL:-}" ]; then
    echo "MODEL=$MODEL: the paper's experiment on it, by main.py"
    script=(main.py --model "$MODEL" --calib_dataset wikitext2 --test_dataset wikitext2)
else
    echo "no MODEL is set: ways to quantize the bundled model, by compare.py"
    script=(compare.py --model assets/tiny-llama --calib_dataset assets/stories/calibration.txt
        --test_dataset assets/stories/test.txt --seqlen 512 --tasks stories_qa
        --rows full rtn smooth hadamard dual best)
fi

source tools/environment.sh
exec "$PYTHON" "${script[@]}" --preset paper --eval_ppl "$@"
