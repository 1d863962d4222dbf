"""Every setting of main.py and of compare.py: JSON and back, identity, and the run's folder."""

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from script_cases import settings_of
from settings_cases import switched_on, with_another

from experiment.compare import comparison_folder
from experiment.options import RunSettings
from experiment.prepare import run_folder
from experiment.rows import CompareSettings
from experiment.tables import without_effect
from utils.settings import Changes, Option, from_dict, identity, options, to_dict

MMLU = ("--eval_mmlu", "--mmlu_data_dir", "d")  # neither is accepted without the other
# Most settings have another value that is accepted alone, or where those are that they belong to.
COMPANY = ((), ("--smooth",), ("--report",), ("--eval_ppl",), ("--tasks", "piqa"), MMLU, ("--multigpu",))
COMPANY += (("--abits", "4"), ("--sensitivity",), ("--eval_mtbench",), ("--eval_mtbench", "--judge_base_url", "u"))

# Marked as changing no figure: written out, so that a wrong mark is seen. The same experiment with another value of
# these replaces its own results.
IDLE = {"preset", "net", "cache_dir", "trust_remote_code", "act_shifts", "offload_calibration", "output_dir", "track"}
IDLE |= {"eval_batch_size", "expand", "multigpu", "max_memory", "log_samples", "keep"}
IDLE |= {"judge_base_url", "judge_api_key_env"}
GRADED = {"judge_model", "mtbench_references"}  # a judge may come later: what it grades is in the folder
IDLE_IN = {
    RunSettings: IDLE
    | {"stream", "save_model", "export", "verify", "save_dir", "resume", "dry_run", "report", "report_layers"},
    CompareSettings: IDLE | {"rows", "seeds"},  # each has files of its own in the folder
}
UNNAMED_IN = {cls: idle | GRADED | ({"seed"} if cls is CompareSettings else set()) for cls, idle in IDLE_IN.items()}

EVERY = [(cls, each) for cls in IDLE_IN for each in options(cls)]
every_setting = pytest.mark.parametrize(
    ("cls", "each"), EVERY, ids=[f"{cls.__name__} {each.name}".replace("Settings", "") for cls, each in EVERY]
)


def two_values(cls: type, each: Option) -> tuple[Any, Any]:
    """Settings, and the same with another value of `each`."""
    if each.name == "eval_mmlu":
        return settings_of(cls=cls), settings_of(*MMLU, cls=cls)
    company = [flags for flags in COMPANY if cls is RunSettings or flags not in (("--smooth",), ("--report",))]
    for usual in (switched_on(cls, each), *(settings_of(*flags, cls=cls) for flags in company)):
        with contextlib.suppress(AssertionError):
            return usual, with_another(usual, each)
    raise AssertionError(f"{each.name}: no other value is accepted; say in COMPANY what it needs")


def folder_of(settings: Any) -> str:
    """The name of the folder that a run with these settings has."""
    if isinstance(settings, CompareSettings):
        return comparison_folder(settings, "net")
    return run_folder(settings, SimpleNamespace(net="net", saved=None))


@every_setting
def test_another_value_of_any_setting_goes_to_json_and_back(cls, each):
    usual, changed = two_values(cls, each)
    assert changed != usual
    assert from_dict(cls, json.loads(json.dumps(to_dict(changed)))) == changed


@every_setting
def test_another_value_of_any_setting_is_another_identity_and_where_figures_differ_another_folder(cls, each):
    usual, changed = two_values(cls, each)
    assert identity(changed) != identity(usual)
    named = each.name not in UNNAMED_IN[cls]
    assert (folder_of(changed) != folder_of(usual)) is named
    assert (identity(changed, Changes.FIGURES) != identity(usual, Changes.FIGURES)) is (each.changes >= Changes.FIGURES)


@pytest.mark.parametrize("cls", IDLE_IN)
def test_what_changes_no_figure_is_what_is_written_here(cls):
    assert {each.name for each in options(cls) if each.changes is Changes.NOTHING} == IDLE_IN[cls]
    assert {each.name for each in options(cls) if each.changes is Changes.GRADES} == GRADED


def test_runs_side_by_side_name_every_setting_that_can_change_a_figure():
    assert without_effect() == IDLE_IN[RunSettings] | {"quiet"}


@pytest.mark.parametrize("cls", IDLE_IN)
def test_no_two_settings_share_a_folder(cls):
    named = [each for each in options(cls) if each.name not in UNNAMED_IN[cls]]
    folders = {identity(made, Changes.FIGURES): folder_of(made) for each in named for made in two_values(cls, each)}
    assert len(set(folders.values())) == len(folders) > len(named)


@pytest.mark.parametrize("cls", IDLE_IN)
def test_switches_name_the_folder_too(cls):
    smooth = ("--no_smooth",) if cls is CompareSettings else ("--smooth",)
    made = [settings_of(*flags, cls=cls) for flags in ((), smooth, ("--lwc",), (*smooth, "--lwc"))]
    assert len({folder_of(each) for each in made}) == 4


def test_layers_are_decided_by_the_method_and_by_what_a_checkpoint_knows_by_its_content():
    names = {each.name for each in options(RunSettings) if each.changes is Changes.LAYERS and each.path[0] != "quant"}
    known = {"calib_dataset", "nsamples", "seqlen", "add_bos", "dtype", "attn_implementation", "act_scales"}
    assert names == known, "experiment.prepare.checkpoint_identity says these one by one: add what is new"


def test_folders_are_readable():
    settings = settings_of("--abits", 4, "--smooth", "--lac", 0.9, "--kbits", 8, "--transform", "hadamard")
    assert folder_of(settings) == "net_w4a4_k8_lac0.9_smooth_hadamard"
    assert folder_of(settings_of()) == "net_w4a16"


def test_a_checkpoint_of_the_papers_own_code_is_another_run():
    assert folder_of(settings_of("--resume", "duquant_parameters.pth")) == "net_w4a16_original"
