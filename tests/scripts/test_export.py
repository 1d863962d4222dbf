"""--export and --verify through the scripts."""

import importlib.util
import json

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from script_cases import assert_refused, common, results_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed; pip install compressed-tensors==0.20.0",
)
FLAGS = ("--wbits", 4, "--abits", 4, "--qbits", 16, "--kbits", 16, "--vbits", 16, "--symmetric", "--act_symmetric")
FLAGS += ("--symmetric_range", "full", "--smooth", "--gqa_smooth", "fold", "--transform", "permute_rotate")
FLAGS += ("--block_size", 16, "--max_rotation_step", 10, "--net", "tiny")
EXPORT = ("--export", "compressed-tensors")
TELLS_OTHER_LOGITS = """
import sys
if "duquant.verify" in sys.orig_argv:
    import safetensors.torch
    real = safetensors.torch.load_file
    safetensors.torch.load_file = lambda path: {k: v * (1.5 if k == "logits" else 1) for k, v in real(path).items()}
"""


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.fixture(scope="module")
def exported(model_folder, token_file, tmp_path_factory):
    """A run of main.py --export --verify --save_model: its folder, and how it ended."""
    folder = tmp_path_factory.mktemp("exported")
    flags = (
        *common(model_folder, token_file),
        *FLAGS,
        "--eval_ppl",
        "--export",
        "compressed-tensors",
        "out",
        "--save_model",
        "saved",
    )
    done = run_script("main.py", *flags, "--verify", folder=folder)
    return folder, done


def test_what_was_exported_is_run_by_others_and_is_what_the_run_measured(exported):
    folder, done = exported
    assert done.returncode == 0, done.stderr
    assert "run by transformers and compressed-tensors alone: logits differ by 0.00e+00" in done.stdout + done.stderr
    results = results_of(folder)
    assert results["error"] is None
    [[label, measured]] = results["perplexity"].items()
    card = (folder / "out/README.md").read_text(encoding="utf-8")
    assert f"| {label} | – | {measured:.4f} |" in card
    assert results["command"] in card
    assert "from duquant.exported import load" in card
    assert "| `symmetric_range` | full |" in card
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith((".out", "out"))) == ["out", "output"]


def test_the_config_is_one_that_compressed_tensors_accepts_whole(exported):
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import TransformConfig

    made = json.loads((exported[0] / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert len(TransformConfig.model_validate(made.pop("transform_config")).config_groups) == 8
    kept = QuantizationConfig.model_validate(made).model_dump(mode="json")
    assert kept["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert kept["format"] == "pack-quantized"


def test_a_streamed_model_and_a_saved_one_are_exported_alike(exported, model_folder, token_file, tmp_path):
    expected = tensors_of(exported[0] / "out")
    data = common(model_folder, token_file)
    for flags in ((*data, *FLAGS, "--stream"), ("--model", exported[0] / "saved", "--test_dataset", token_file)):
        folder = tmp_path / str(len(flags))
        folder.mkdir()
        done = run_script("main.py", *flags, "--export", "out", folder=folder)
        assert done.returncode == 0, done.stderr
        found = tensors_of(folder / "out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_folder_that_others_run_otherwise_ends_the_run_with_code_1(model_folder, token_file, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(TELLS_OTHER_LOGITS, encoding="utf-8")
    flags = (*common(model_folder, token_file), *FLAGS, "--eval_ppl", "--export", "out", "--verify")
    done = run_script("main.py", *flags, folder=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    assert "--verify: logits differ by 33.33% of their length, which may be 0.1%" in done.stderr
    assert "--verify (logits)" in results_of(tmp_path)["error"]


def test_what_cannot_be_told_ends_in_one_line_before_anything_is_computed(model_folder, token_file, tmp_path):
    data = common(model_folder, token_file)
    for flags, message in (
        (("--transform", "dual"), "--export: --transform dual permutes activations when it runs"),
        (("--stream", "--verify", "--eval_ppl"), "--verify needs the whole model"),
    ):
        done = run_script("main.py", *data, *FLAGS, "--export", "out", *flags, folder=tmp_path)
        assert_refused(done, message)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    done = run_script("main.py", *data, *FLAGS, "--export", "out", folder=tmp_path)
    assert_refused(done, "--export out: is there already and not empty")
