# Sourced by the scripts beside it, which compare the MODELS of one table and lay the figures beside the published ones.
#
# MODELS: ids on the hub, or local folders without blanks in their paths, separated by blanks. A folder whose name is not
# that of the published model needs --net, and a MODELS of its own.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh

compare_models() { # folder in output/, then flags of compare.py
    local folder="output/$1" failed=0 finished=()
    shift
    for model in $MODELS; do
        "$PYTHON" compare.py --model "$model" --output_dir "$folder" --preset paper "$@" || failed=1
    done
    for results in "$folder"/*/results.json; do
        [ -f "$results" ] && finished+=("$(dirname "$results")")
    done
    [ "${#finished[@]}" -eq 0 ] || "$PYTHON" compare.py "${finished[@]}" --published
    return "$failed"
}
