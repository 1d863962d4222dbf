"""From flags to a checked model and its calibration tokens: what every script does first."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from quantize.export import attach_transforms_, saved_config
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from models import decoder_spec
from models.load import (
    ModelSource,
    context_length,
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
    model_fingerprint,
    pick_dtype,
)
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec
from quantize.statistics import Origin
from utils.data import calibration_tokens, data_fingerprint, is_token_file
from utils.device import DTYPES, pick_device
from utils.distributed import local_rank
from utils.errors import InputError

DEFAULT_NSAMPLES = 128  # when --nsamples is not given and the data is not a file of tokens


@dataclass(frozen=True)
class Setup:
    """A model and its calibration tokens, everything checked, no weights loaded yet."""

    source: ModelSource
    config: PretrainedConfig
    spec: DecoderSpec
    skeleton: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    tokens: Tensor | None  # None for a model that is quantized already
    net: str
    saved: QuantSettings | None  # the settings of such a model
    seqlen: int  # tokens per sample, and per test window

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.spec.decoder_layers(self.skeleton))

    def origin(self) -> Origin:
        """What statistics of this model and these tokens are made from."""
        model = model_fingerprint(self.source, self.config)
        return Origin(self.source.name, model, data_fingerprint(self.tokens))


def settings_of(args: argparse.Namespace, setup: Setup) -> dict:
    """Every flag, with what was resolved of those that may be left out."""
    samples = {} if setup.tokens is None else {"nsamples": len(setup.tokens)}
    return {**vars(args), **samples, "seqlen": setup.seqlen, "net": setup.net}


def make_setup(args: argparse.Namespace) -> Setup:
    """Check the model and calibration options and fetch the tokens. Raises InputError for whatever is wrong."""
    source = ModelSource(args.model, args.trust_remote_code)
    config = load_config(source)
    spec = decoder_spec(config)
    device = pick_device(args.device, local_rank())
    tokenizer = load_tokenizer(source)
    for flag, value in (("--nsamples", args.nsamples), ("--seqlen", args.seqlen)):
        if value is not None and value < (1 if flag == "--nsamples" else 2):
            raise InputError(f"{flag} {value}: too small")
    longest = getattr(config, "max_position_embeddings", None)
    if args.seqlen is not None and longest is not None and args.seqlen > longest:
        raise InputError(f"--seqlen {args.seqlen}: the model's maximum is {longest}")
    saved = take_saved_config(config)
    tokens = None if saved else fetch_tokens(args, config, tokenizer)
    return Setup(
        source=source,
        config=config,
        spec=spec,
        skeleton=load_skeleton(config, args.trust_remote_code),
        tokenizer=tokenizer,
        device=device,
        dtype=pick_dtype(args.dtype, config, device, DTYPES),
        tokens=tokens,
        net=args.net or Path(args.model).resolve().name,
        saved=saved,
        seqlen=args.seqlen or context_length(config) if tokens is None else tokens.shape[1],
    )


def take_saved_config(config: PretrainedConfig) -> QuantSettings | None:
    """The settings of a model written by `--save_model`, taken out of its config; None for any other model.

    Raises InputError for a model that is quantized in another way.
    """
    saved = saved_config(config)
    if saved is not None:
        del config.quantization_config
    elif getattr(config, "quantization_config", None):
        raise InputError("--model: is quantized already, by another method; give the full-precision model")
    return saved


def fetch_tokens(args: argparse.Namespace, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The calibration tokens [N, T]."""
    from_file = is_token_file(args.calib_dataset)
    return calibration_tokens(
        args.calib_dataset,
        tokenizer,
        nsamples=args.nsamples if from_file else args.nsamples or DEFAULT_NSAMPLES,
        seqlen=args.seqlen if from_file else args.seqlen or context_length(config),
        seed=args.seed,
        cache_dir=args.cache_dir,
        vocab_size=config.vocab_size,
    )


def open_model(setup: Setup, attention: str) -> torch.nn.Module:
    """The model with its weights, on the host.

    On a CPU it computes in float32 whatever `--dtype` says (the weights are rounded to that dtype first):
    half-precision products are slow there and lose accuracy for nothing.
    """
    model = load_model(setup.source, setup.config, setup.dtype, attention)
    if setup.device.type == "cpu":
        model.float()
    if setup.saved is not None:
        attach_transforms_(model, Path(setup.source.name), setup.spec, setup.saved)
    return model
