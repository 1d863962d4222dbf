"""The settings of a run of main.py, beside those of the method and of the evaluations: where, on what, and whither."""

import argparse
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from evaluation.settings import EvaluationSettings
from experiment.presets import PresetSettings
from quantize.settings import QuantSettings
from utils.errors import InputError
from utils.flags import BehindWord
from utils.settings import Changes, option, part

TARGET = "compressed-tensors"  # what --export writes, as its word


class Keep(StrEnum):
    """Where weights and hidden states are between their uses."""

    AUTO = "auto"  # on the GPU as far as they fit
    DEVICE = "device"  # on the GPU, whatever the estimate says
    HOST = "host"  # one layer, and one batch of hidden states, visit the GPU at a time


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and where and how it runs."""

    TITLE: ClassVar[str] = "model"

    model: str | None = option(
        None, "local folder or hub id of a Hugging Face model", changes=Changes.FIGURES, basic=True
    )
    net: str | None = option(
        None,
        "short name of the model, for files and folders (default: last part of --model)",
        changes=Changes.NOTHING,
    )
    cache_dir: Path = option(
        Path("cache"), "folder for token caches; hub files keep to HF_HOME", changes=Changes.NOTHING
    )
    dtype: str = option(
        "auto",
        "of weights and activations; auto is float32 on a CPU and the checkpoint's own elsewhere",
        choices=["auto", "float32", "float16", "bfloat16"],
        tag="",
    )
    device: str | None = option(
        None, "such as cuda, cuda:1 or cpu (default: the first GPU, else the CPU)", changes=Changes.FIGURES, basic=True
    )
    keep: Keep = option(
        Keep.AUTO,
        "where weights and hidden states are between their uses: auto (on the GPU as far as they fit), device, host",
        changes=Changes.NOTHING,
    )
    attn_implementation: str = option(
        "sdpa", "attention of transformers to build on", choices=["sdpa", "eager"], tag=""
    )
    trust_remote_code: bool = option(
        False, "run Python code that comes with the model (off: never)", changes=Changes.NOTHING
    )

    @property
    def name(self) -> str:
        """The model in files' and folders' names."""
        return self.net or Path(self.model).resolve().name


@dataclass(frozen=True)
class MemorySettings:
    """How much of the model is there at once."""

    TITLE: ClassVar[str] = "model, memory"

    stream: bool | None = option(
        None,
        "read one decoder layer at a time from the safetensors files, quantize and measure it, and drop it; perplexity "
        "only (default: where the model does not fit into the host's memory)",
        changes=Changes.NOTHING,
    )


class AddBos(StrEnum):
    """Whether every window of tokens begins with BOS, in place of its last token of text."""

    AUTO = "auto"  # where the model's family is lost without it
    ALWAYS = "always"
    NEVER = "never"  # cut from the stream as it comes, as the field's published figures are


@dataclass(frozen=True)
class CalibrationSettings:
    """Which text the method looks at."""

    TITLE: ClassVar[str] = "calibration"

    calib_dataset: str = option(
        "wikitext2",
        "wikitext2, ptb, c4, pile, mix; NAME=PATH for a local copy of one; or any .txt, .jsonl, .parquet, folder saved "
        "by datasets, or .safetensors with token ids in the tensor `calibration`",
        basic="wikitext2, c4, …, NAME=PATH of a copy, or a text file (default: wikitext2)",
    )
    nsamples: int | None = option(None, "calibration samples (default: 128, or all rows of a token file)", basic=True)
    seqlen: int | None = option(
        None,
        "tokens per sample and per test window (default: 2048 or the model's maximum if less; the width of a token "
        "file)",
        basic="tokens per sample and test window (default: 2048, or the maximum)",
    )
    add_bos: AddBos = option(
        AddBos.AUTO,
        "whether every calibration and test window begins with BOS: auto where the family is lost without it (Gemma), "
        "always, or never (then only what the tokenizer puts before a whole text); a token file is taken as it is",
    )

    def __post_init__(self) -> None:
        for flag, value, least in (("--nsamples", self.nsamples, 1), ("--seqlen", self.seqlen, 2)):
            if value is not None and value < least:
                raise InputError(f"{flag} {value}: too small")


@dataclass(frozen=True)
class StatisticsFiles:
    """Where activation statistics are read from, or kept."""

    TITLE: ClassVar[str] = "method, smoothing"

    act_scales: Path | None = option(None, "statistics file to use (default: act_scales/<net>.safetensors)")
    act_shifts: Path | None = option(
        None,
        "file for the shifts when statistics are computed",
        changes=Changes.NOTHING,
    )


@dataclass(frozen=True)
class TrackSettings:
    """Who else is told the figures."""

    TITLE: ClassVar[str] = "output"

    track: str = option(
        "none",
        "also give settings and figures to TensorBoard or Weights & Biases, layer by layer as they are found",
        basic="also tell tensorboard or wandb, while the run goes on",
        choices=["none", "tensorboard", "wandb"],
        changes=Changes.NOTHING,
    )


@dataclass(frozen=True)
class OutputSettings:
    """Where results go."""

    TITLE: ClassVar[str] = "output"

    output_dir: Path = option(
        Path("output"),
        "results go to a folder in here that is named after the settings",
        changes=Changes.NOTHING,
        basic=True,
    )
    save_model: Path | None = option(
        None, "folder for the quantized model; main.py --model loads it again", changes=Changes.NOTHING, basic=True
    )
    save_dir: Path | None = option(
        None, "folder for a checkpoint, written layer by layer", changes=Changes.NOTHING, basic=True
    )
    export: Path | None = option(
        None,
        "the format, which may be left out, and a folder for the quantized model as other engines (vLLM, transformers) "
        "load it: symmetric integers, MXFP4 or NVFP4, and rotations, as compressed-tensors describes them; says what "
        "cannot be told so before anything is computed",
        changes=Changes.NOTHING,
        nargs="+",
        action=BehindWord,
        const=TARGET,
        metavar=(TARGET, "FOLDER"),
    )
    verify: bool = option(
        False,
        "load what --export wrote with transformers and compressed-tensors alone, in a process of its own, and compare "
        "logits, levels and perplexity; exit code 1 where they are not those of this run",
        changes=Changes.NOTHING,
    )
    resume: Path | None = option(
        None,
        "go on with such a checkpoint (with the flags it was made with), or reapply a duquant_parameters.pth",
        changes=Changes.NOTHING,
        basic="go on with such a checkpoint, with the flags it was made with",
    )
    dry_run: bool = option(
        False,
        "check everything and say what the run would do and need (memory, disk, time) and what is still missing for "
        "it; the model's config.json is enough; exit code 2 with the reason if it cannot work here or with these flags",
        changes=Changes.NOTHING,
        basic="only say what the run would do, need (memory, disk, time) and miss",
    )
    track: TrackSettings = part(TrackSettings)

    def __post_init__(self) -> None:
        if self.save_dir is not None and self.resume is not None:
            raise InputError("--save_dir begins a checkpoint and --resume goes on with one: give one of them")

    @property
    def original(self) -> bool:
        """Whether `--resume` names a checkpoint of the paper's own code."""
        return self.resume is not None and self.resume.suffix == ".pth"


def layer_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list of layers, each once."""
    if not all(number.strip().isdigit() for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer numbers like 0,1,15,31")
    return tuple(dict.fromkeys(int(number) for number in text.split(",")))


@dataclass(frozen=True)
class ReportLayers:
    """`--report_layers`, of main.py and of report.py."""

    TITLE: ClassVar[str] = "output, report"

    report_layers: tuple[int, ...] | None = option(
        None,
        "layers to draw one by one, as 0,1,15,31 (default: the five with the largest output error)",
        changes=Changes.NOTHING,
        type=layer_numbers,
        nargs=None,
        metavar="N,N,…",
    )


@dataclass(frozen=True)
class ReportSettings:
    """The page with figures."""

    TITLE: ClassVar[str] = "output, report"

    report: bool = option(
        False,
        "write report/index.html: what quantization did, layer by layer, in figures; the full-precision model is "
        "measured too (not on MT-Bench)",
        changes=Changes.NOTHING,
        basic="write report/index.html: what quantization did, layer by layer",
    )
    layers: ReportLayers = part(ReportLayers)

    def __post_init__(self) -> None:
        if self.layers.report_layers and not self.report:
            raise InputError("--report_layers is for --report: add it, or leave this out")


@dataclass(frozen=True)
class RunSettings:
    """Everything that main.py is told."""

    model: ModelSettings = part(ModelSettings)
    memory: MemorySettings = part(MemorySettings)
    calibration: CalibrationSettings = part(CalibrationSettings)
    preset: PresetSettings = part(PresetSettings)
    quant: QuantSettings = part(QuantSettings)
    statistics: StatisticsFiles = part(StatisticsFiles)
    evaluation: EvaluationSettings = part(EvaluationSettings)
    output: OutputSettings = part(OutputSettings)
    report: ReportSettings = part(ReportSettings)

    def __post_init__(self) -> None:
        if self.statistics.act_scales is not None and self.quant.smooth is None:
            raise InputError("--act-scales is for smoothing: add --smooth, or leave it out")
