"""The flags of evaluation as settings: round trip, what another value changes, what cannot be, and no torch."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from evaluation.mtbench.conversation import FORMATS
from evaluation.mtbench.settings import CHAT_FORMATS, TEMPLATE
from evaluation.settings import EvaluationSettings, entries
from utils.errors import InputError
from utils.setting_flags import add_flags, from_flags
from utils.settings import Changes, flat, from_dict, identity, options, to_dict

NOT_FIGURES = {"eval_batch_size", "expand", "multigpu", "max_memory", "log_samples"}
NOT_FIGURES |= {"judge_base_url", "judge_model", "judge_api_key_env", "mtbench_references"}  # a judge may come later
EVERY_FLAG = """
--limit 3 --eval_batch_size 2 --runtime integer --expand per_call --multigpu --max_memory 0=1GiB cpu=2GiB
--eval_ppl --test_dataset ptb,c4 other --eval_kl
--sensitivity --sensitivity_windows 3
--tasks piqa,boolq arc_easy --num_fewshot 2 --task_data_dir items --log_samples
--eval_mmlu --mmlu_data_dir mmlu --mmlu_shots 1 2 --prompt a b --max_new_tokens 7
--eval_mtbench --mtbench_questions q.jsonl --mtbench_references r.jsonl --mtbench_temperature category
--chat_format vicuna --judge_base_url http://host/v1 --judge_model grader --judge_api_key_env KEY
"""


def parsed(*flags: str) -> EvaluationSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser, EvaluationSettings)
    return from_flags(EvaluationSettings, parser.parse_args(flags))


def test_every_flag_arrives_in_the_settings_and_survives_json():
    settings = parsed(*EVERY_FLAG.split())
    usual = flat(EvaluationSettings())
    assert {name for name, value in flat(settings).items() if value == usual[name]} == set()
    assert from_dict(EvaluationSettings, to_dict(settings)) == settings
    assert settings.perplexity.test_dataset == ("ptb", "c4", "other")
    assert settings.tasks.tasks == ("piqa", "boolq", "arc_easy")
    assert settings.tasks.task_data_dir == Path("items")
    assert parsed() == EvaluationSettings()
    assert parsed("--eval_batch_size", "auto").eval_batch_size is None


def test_what_changes_no_figure_changes_only_the_whole_identity():
    settings, usual = parsed(*EVERY_FLAG.split()), EvaluationSettings()
    assert {each.name for each in options(EvaluationSettings) if each.changes < Changes.FIGURES} == NOT_FIGURES
    batched = replace(usual, eval_batch_size=3)
    assert identity(batched) != identity(usual)
    assert identity(batched, Changes.FIGURES) == identity(usual, Changes.FIGURES)
    assert identity(settings, Changes.LAYERS) == identity(usual, Changes.LAYERS), "layers are the same"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--limit 0", "--limit 0: must be at least 1"),
        ("--max_new_tokens 0", "--max_new_tokens 0: must be at least 1"),
        ("--max_memory 0=1GiB", "--max_memory is for --multigpu"),
        ("--eval_kl", "--eval_kl is measured with perplexity: add --eval_ppl"),
        ("--sensitivity_windows 3", "--sensitivity_windows is for --sensitivity"),
        ("--sensitivity --sensitivity_windows 0", "--sensitivity_windows 0: must be at least 1"),
        ("--task_data_dir d", "--task_data_dir is for --tasks"),
        ("--log_samples", "--log_samples is for --tasks"),
        ("--mmlu_data_dir d", "--mmlu_data_dir is for --eval_mmlu"),
        ("--eval_mmlu", "--mmlu_data_dir DIR"),
        ("--mmlu_shots 2 -1", "--mmlu_shots -1: must be at least 0"),
        ("--chat_format plain", "--chat_format is for --eval_mtbench"),
        ("--judge_base_url http://host/v1", "--judge_base_url is for --eval_mtbench"),
        ("--eval_mtbench --judge_api_key_env KEY", "--judge_api_key_env is for --judge_base_url"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        parsed(*flags.split())


def test_entries_have_keys_and_stages_of_their_own():
    keys = [key for entry in entries() for key in entry.EMPTY]
    perplexity = ["perplexity", "perplexity_details", "bos_check", "sensitivity"]
    assert keys == [*perplexity, "zero_shot", "mmlu", "completions", "mt_bench"]
    assert len({entry.STAGE for entry in entries()}) == len(entries())
    assert [entry.FLAG for entry in parsed(*EVERY_FLAG.split()).asked()] == [entry.FLAG for entry in entries()]
    assert parsed().asked() == []


def test_the_formats_that_can_be_asked_for_are_those_there_are():
    assert set(CHAT_FORMATS) == {TEMPLATE, *FORMATS}


def test_neither_settings_nor_tables_load_torch():
    code = (
        "import sys; import evaluation.figures, evaluation.measured; print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
