"""Fixtures shared by the tests: a tiny random Llama on disk, its tokens, and running the real scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from starter import Ended, shared_starter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # for tiny tensors waking a second thread costs more than it gives
ROOT = Path(__file__).resolve().parents[1]
OURS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "duquant")
VOCABULARY = 97


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, GQA (6 heads, 2 kv heads), head_dim ≠ hidden/heads, widths that are no powers of two."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random model of `tiny_config` with norms that are not all ones and an outlier channel."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
            parameter[3] *= 20
        else:
            parameter.mul_(4)
    return model


def random_tokens(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [samples, length]."""
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A tiny random model with a tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny-random-llama")
    tiny_model().save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_file(tmp_path_factory) -> Path:
    """Calibration [8, 32] and test [6, 32] token ids in one safetensors file."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"calibration": random_tokens(8, 32, seed=1), "test": random_tokens(6, 32, seed=2)}, path)
    return path


def run_script(script: str, *arguments: object, folder: Path, first: str = "", **environment: str) -> Ended:
    """Run one of the suite's scripts, as a user would, with `folder` as working directory.

    With an `environment` of its own it is started anew; else it is forked from a process that has imported torch, and
    may run a program `first`, to replace what should fail.
    """
    if not environment:
        return shared_starter().run(folder, *arguments, script=script, first=first)
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=600, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def run_in_two(folder: Path, *arguments: object) -> Ended:
    """Run main.py in two processes that share the run, as `torchrun` starts them."""
    return shared_starter().run(folder, *arguments, processes=2)


def run_program(program: str, folder: Path, *arguments: object, processes: int = 2) -> Ended:
    """Run a program in `folder` in processes that find each other."""
    path = folder / "program.py"
    path.write_text(program, encoding="utf-8")
    return shared_starter().run(folder, *arguments, script=str(path), processes=processes)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden vectors: `GOLDEN_DIR`, else `shared/golden` beside the checkout; skips when absent."""
    folder = Path(os.environ.get("GOLDEN_DIR", ROOT.parent / "shared/golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden vectors at {folder}; set GOLDEN_DIR")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and text: `SHARED_DATA_DIR`, else `shared/data` beside the checkout; skips."""
    folder = Path(os.environ.get("SHARED_DATA_DIR", ROOT.parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set SHARED_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def target(tmp_path_factory) -> Path:
    """A folder into which pip installed what the repository's pyproject.toml describes."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    shutil.copy(ROOT / "pyproject.toml", source)  # building leaves files beside it
    for package in ("duquant", *OURS):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target
