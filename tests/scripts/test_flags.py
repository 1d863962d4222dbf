"""The flags of the scripts: those of the first version are all still accepted, and those that came later."""

import contextlib
import importlib

import pytest

MODEL = "--model m|--net n|--cache_dir c|--dtype float16|--device cpu|--attn_implementation eager|--trust_remote_code"
CALIBRATION = "--calib_dataset ptb|--nsamples 3|--seqlen 64|--seed 7"
BOS = "--add_bos always|--add_bos never"
METHOD = """--wbits 3|--abits 4|--group_size 64|--symmetric|--lac 0.9|--swc 0.8|--lwc|--epochs 3|--lwc_lr 0.1|--wd 0.1
--batch_size 2|--aug_loss|--offload_calibration|--alpha 0.6|--smooth_weight_peak group|--gqa_smooth fold
--act-scales s.safetensors|--act-shifts t.safetensors|--block_size 64|--block_size -1|--block_size auto
--max_rotation_step 3|--permutation_times 2|--rotation_search row|--rotation_order QR|--probe sample"""
EVALUATION = """--limit 3|--eval_batch_size 2|--multigpu|--max_memory 0=1GiB cpu=2GiB|--eval_ppl|--test_dataset ptb,c4
--test_dataset ptb c4|--eval_kl|--tasks piqa,boolq|--tasks piqa boolq|--num_fewshot 2|--task_data_dir d|--log_samples
--eval_mmlu|--mmlu_data_dir d|--mmlu_shots 0 2|--prompt a b|--max_new_tokens 3|--eval_mtbench|--mtbench_questions q
--mtbench_references r|--mtbench_temperature category|--chat_format vicuna|--judge_base_url u|--judge_model j
--judge_api_key_env K"""
BOTH = f"{MODEL}\n{CALIBRATION}\n{METHOD}\n{EVALUATION}\n--output_dir o|--track tensorboard|--quiet"
FIRST = {
    "main": f"""{BOTH}
--smooth|--transform hadamard|--transform none|--stream|--no-stream|--save_model s|--save_dir s|--resume r|--dry_run
--report|--report_layers 0,1""",
    "compare": f"{BOTH}\n--smooth --no_smooth|--no_smooth|--rows full dual|--seeds 2 3|--output f.md|a b",
    "report": "--report_layers 0,1|--quiet",
    "get_rot": "--sizes 8 12|--output o|--quiet",
    "generate_act_scale_shift": f"{MODEL}\n{CALIBRATION}\n--scales-output-path s|--shifts-output-path t|--quiet",
}
ROLES = f"""--keep host|--search_rows 64
--qbits 8|--kbits 8|--vbits 8|--act_group_size 64|--act_symmetric|--weight_symmetric|--lac_kv 0.9
--act_scales s|--act_shifts t|--sensitivity|--sensitivity --sensitivity_windows 3
{BOS}"""
BEYOND = """--rounding gptq|--rounding gptq --gptq_damping 0.1|--gptq_target 0.5|--swc search|--lac search
--aformat nvfp4 --lac block
--smooth_measure energy|--channel_shift|--key_mean|--value_mean|--value_rotation|--head_transform balanced
--probe peaks|--probe peaks --probe_tokens 64|--symmetric_range full
--tune_samples 2|--tune_samples 2 --tune_lr 0.003
--lwc --fixed_input_clips|--transform two_hadamard"""
PRESET = """--preset paper|--preset best_trained|--preset paper --no_smooth|--swc 0.8 --lac none|--no_stream
--smooth --no-smooth --eval_ppl|--preset paper --swc none"""
COMPARED = "--preset paper|--no-smooth|--lwc --no_lwc --swc 0.8"
EXPORT = "--transform permute_rotate|--export e|--export compressed-tensors e|--export e --verify"
LATER = {
    "main": f"{ROLES}\n{PRESET}\n{BEYOND}\n{EXPORT}",
    "compare": f"{ROLES}\n{COMPARED}\n" + BEYOND.removesuffix("|--transform two_hadamard"),
    "generate_act_scale_shift": f"--scales_output_path s|--shifts_output_path t|--keep device|{BOS}",
}
REQUIRED = {"compare": "--model other", "report": "run", "generate_act_scale_shift": "--model other"}
ALL = [
    (script, flags)
    for scripts in (FIRST, LATER)
    for script, text in scripts.items()
    for flags in text.replace("\n", "|").split("|")
]


def parsed(script: str, flags: str, monkeypatch) -> dict:
    """What a script reads from its command line."""
    monkeypatch.setattr("sys.argv", [f"{script}.py", *flags.split()])
    with contextlib.suppress(SystemExit):
        return vars(importlib.import_module(script).parse_flags())
    pytest.fail(f"{script}.py {flags}: not accepted")


@pytest.mark.parametrize(("script", "flags"), ALL, ids=str)
def test_a_flag_is_accepted_and_says_something(script, flags, monkeypatch):
    required = REQUIRED.get(script, "")
    whole = flags if flags in ("--model m", "a b") else f"{required} {flags}"
    assert parsed(script, whole, monkeypatch) != parsed(script, required, monkeypatch)


def test_both_names_of_a_flag_are_one_setting(monkeypatch):
    for first, second in (
        ("--symmetric", "--weight_symmetric"),
        ("--act-scales s", "--act_scales s"),
        ("--export e", "--export compressed-tensors e"),
    ):
        assert parsed("main", first, monkeypatch) == parsed("main", second, monkeypatch)
