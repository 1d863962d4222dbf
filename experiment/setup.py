"""From settings to a checked model and its calibration tokens: what every script does first.

A plan (`--dry_run`) needs the model's config alone: what else is missing is noted, and stood in for.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from evaluation.base import Context
from experiment.options import AddBos, CalibrationSettings, ModelSettings, StatisticsFiles
from models import decoder_spec
from models.load import (
    ModelSource,
    check_weights,
    context_length,
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
    longest_context,
    model_fingerprint,
    pick_dtype,
)
from models.saved import load_saved_model, read_settings
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec
from quantize.statistics import ChannelStatistics, Origin, load_scales, same_calibration, save_statistics
from utils.corpora import MIX
from utils.data import calibration_tokens, data_fingerprint, is_token_file
from utils.device import DTYPES, pick_device
from utils.distributed import is_main, local_rank, world_size
from utils.errors import InputError, Missing, noting
from utils.windows import Bos

DEFAULT_NSAMPLES = 128  # when --nsamples is not given and the data is not a file of tokens
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """A model and its calibration tokens, everything checked, no weights loaded yet.

    `calibration`: (samples, tokens each); in a plan whose data are missing, what they are meant to be.
    """

    model: ModelSettings
    source: ModelSource
    config: PretrainedConfig
    spec: DecoderSpec
    skeleton: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    tokens: Tensor | None  # None where nothing is calibrated, or in a plan whose data are missing
    tuning_tokens: Tensor | None  # those drawn behind them, on which the whole is tuned
    calibration: tuple[int, int]
    saved: QuantSettings | None  # the settings of a model that is quantized already
    seqlen: int  # tokens per sample, and per test window
    bos: Bos | None = None  # None where the tokenizer has none, or in a plan without a tokenizer

    @property
    def adds_bos(self) -> bool:
        """Whether windows that are cut from text begin with BOS."""
        return self.bos is not None and self.bos.begins

    @property
    def net(self) -> str:
        """The model in files' and folders' names."""
        return self.model.name

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.spec.decoder_layers(self.skeleton))

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model computes in: on a CPU float32 whatever `--dtype` says, with weights rounded to that first.

        Half-precision products are slow there and lose accuracy for nothing.
        """
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def origin(self) -> Origin:
        """What statistics of this model and these tokens are made from."""
        data = "" if self.tokens is None else data_fingerprint(self.tokens)
        return Origin(self.source.name, model_fingerprint(self.source, self.config), data)

    def context(self, given_seqlen: int | None, seed: int) -> Context:
        """What evaluations may know."""
        return Context(
            model=self.source.name,
            config=self.config,
            spec=self.spec,
            tokenizer=self.tokenizer,
            device=self.device,
            longest=longest_context(self.config),
            seqlen=self.seqlen,
            given_seqlen=given_seqlen,
            seed=seed,
            cache_dir=self.model.cache_dir,
            bos=self.bos,
        )


class NoTokenizer:
    """Stands in for a tokenizer in a plan: whatever wants to use it finds that it is missing."""

    def __getattr__(self, name: str):
        raise Missing("needs the tokenizer")


def make_setup(
    model: ModelSettings,
    calibration: CalibrationSettings,
    seed: int,
    calibrates: bool = True,
    missing: list[str] | None = None,
    further: int = 0,
) -> Setup:
    """Check the model, and fetch the tokens if something is calibrated on them. Raises InputError for what is wrong.

    With a list for it, what is only `missing` is noted there. `further`: samples to tune on, behind those.
    """
    if model.model is None:
        raise InputError("--model: say which, a local folder or a hub id")
    source = ModelSource(model.model, model.trust_remote_code)
    config = load_config(source)
    spec = decoder_spec(config)
    device = pick_device(model.device, local_rank())
    tokenizer, tokens, more, bos = NoTokenizer(), None, None, None
    with noting(missing):
        check_weights(source)
    with noting(missing):
        tokenizer = load_tokenizer(source)
        bos = window_bos(calibration.add_bos, spec.needs_bos, tokenizer)
    longest = getattr(config, "max_position_embeddings", None)
    if calibration.seqlen is not None and longest is not None and calibration.seqlen > longest:
        raise InputError(f"--seqlen {calibration.seqlen}: the model's maximum is {longest}")
    saved = take_settings(config)
    seqlen, samples = calibration.seqlen or context_length(config), 0
    if calibrates and saved is None:
        samples = calibration.nsamples or DEFAULT_NSAMPLES
        with noting(missing, "--calib_dataset"):
            tokens, more = fetch_tokens(model, calibration, seed, config, tokenizer, bos, further)
            samples, seqlen = tokens.shape
    return Setup(
        model=model,
        source=source,
        config=config,
        spec=spec,
        skeleton=load_skeleton(config, model.trust_remote_code),
        tokenizer=tokenizer,
        device=device,
        dtype=pick_dtype(model.dtype, config, device, DTYPES),
        tokens=tokens,
        tuning_tokens=more,
        calibration=(samples, seqlen),
        saved=saved,
        seqlen=seqlen,
        bos=bos,
    )


def window_bos(add: AddBos, needed: bool, tokenizer: PreTrainedTokenizerBase) -> Bos | None:
    """The tokenizer's BOS, and whether windows begin with it; `needed`: the model is lost if they do not.

    Raises InputError if they always are to and there is none.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        if add is AddBos.ALWAYS:
            raise InputError("--add_bos always: the model's tokenizer has no BOS; drop the flag")
        if add is AddBos.AUTO and needed:
            logger.warning("windows should begin with BOS for this family of models, but the tokenizer has none")
        return None
    return Bos(token, add is AddBos.ALWAYS or (add is AddBos.AUTO and needed), strict=add is AddBos.ALWAYS)


def take_settings(config: PretrainedConfig) -> QuantSettings | None:
    """The settings of a model written by `--save_model`, taken out of its config; None for any other model.

    Raises InputError for a model that is quantized in another way.
    """
    saved = read_settings(config)
    if saved is not None:
        del config.quantization_config
    elif getattr(config, "quantization_config", None):
        raise InputError("--model: is quantized already, by another method; give the full-precision model")
    return saved


def fetch_tokens(
    model: ModelSettings,
    calibration: CalibrationSettings,
    seed: int,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    bos: Bos | None,
    further: int = 0,
) -> tuple[Tensor, Tensor]:
    """The calibration tokens [N, T], and those [further, T] that are drawn behind them.

    Of a file of tokens without --nsamples the further ones are the last. Raises InputError if it has no others, for a
    mix, whose corpora stand one behind the other, and for so few that there is no step behind the first.
    """
    from_file = is_token_file(calibration.calib_dataset)
    if further and calibration.calib_dataset == MIX:
        raise InputError("--tune_samples: cannot be drawn from a mix; name one of its corpora as --calib_dataset")
    if 0 < further <= world_size():
        more = f"more than {world_size()} are needed, one for each process and others to tell what that gained"
        raise InputError(f"--tune_samples {further}: {more}")
    wanted = calibration.nsamples or (None if from_file else DEFAULT_NSAMPLES)
    tokens = calibration_tokens(
        calibration.calib_dataset,
        tokenizer,
        nsamples=None if from_file and further else wanted and wanted + further,
        seqlen=calibration.seqlen if from_file else calibration.seqlen or context_length(config),
        seed=seed,
        cache_dir=model.cache_dir,
        vocab_size=config.vocab_size,
        bos=bos,
    )
    count = (wanted or len(tokens) - further) if further else len(tokens)
    if count < 1:
        raise InputError(f"--tune_samples {further}: leaves none of {len(tokens)} samples to calibrate the layers on")
    if count + further > len(tokens):
        raise InputError(f"--nsamples {count} and --tune_samples {further}: the file has only {len(tokens)} samples")
    return tokens[:count], tokens[count : count + further]


def open_model(setup: Setup) -> torch.nn.Module:
    """The model with its weights, on the host."""
    attention = setup.model.attn_implementation
    if setup.saved is not None:
        how = (setup.saved, setup.compute_dtype, attention)
        return load_saved_model(setup.source, setup.config, setup.spec, *how)
    return load_model(setup.source, setup.config, setup.dtype, attention).to(setup.compute_dtype)


def scales_path(files: StatisticsFiles, setup: Setup) -> Path:
    """The file of activation statistics that a run reads, or keeps its own in."""
    return files.act_scales or Path("act_scales") / f"{setup.net}.safetensors"


def known_peaks(files: StatisticsFiles, setup: Setup) -> dict[str, Tensor] | None:
    """Channel peaks by linear name from the file, if it is of this model and data; None if they must be computed."""
    path = scales_path(files, setup)
    if files.act_scales is None and not (path.exists() and same_calibration(path, setup.origin())):
        return None
    logger.info("activation statistics: %s", path)
    return load_scales(path, setup.origin(), setup.skeleton, setup.spec)


def keep_statistics(files: StatisticsFiles, setup: Setup, statistics: ChannelStatistics) -> None:
    """Write what was computed, unless there is a file of another model or of other data."""
    path = scales_path(files, setup)
    if path.exists():
        logger.info("activation statistics: computed; %s is of another model or other data and was left alone", path)
    elif is_main():
        shifts = files.act_shifts or Path("act_shifts") / f"{setup.net}.safetensors"
        try:
            save_statistics(statistics, path, shifts, setup.origin())
            logger.info("activation statistics: computed, kept in %s", path)
        except OSError as error:
            logger.warning("activation statistics: computed, not kept (%s)", error)
