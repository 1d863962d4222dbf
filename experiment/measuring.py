"""What evaluations are told of a run: its model, and what decides every figure of it."""

import argparse

from evaluation.base import Context
from experiment.session import Setup
from models.load import longest_context, model_fingerprint
from utils.data import data_fingerprint
from utils.io import file_digest

# Flags that say how a model is made; of those that follow from them, the content is compared and not the name.
MAKING = (
    *("dtype", "attn_implementation", "nsamples", "seqlen", "seed", "wbits", "abits", "group_size", "symmetric"),
    *("lac", "swc", "lwc", "epochs", "lwc_lr", "wd", "batch_size", "aug_loss"),
    *("smooth", "alpha", "smooth_weight_peak", "gqa_smooth"),
    *("transform", "block_size", "max_rotation_step", "permutation_times", "rotation_search"),
    *("rotation_order", "probe"),
)


def evaluation_context(args: argparse.Namespace, setup: Setup) -> Context:
    """The model as evaluations see it."""
    return Context(
        model=args.model,
        config=setup.config,
        spec=setup.spec,
        tokenizer=setup.tokenizer,
        device=setup.device,
        longest=longest_context(setup.config),
        seqlen=setup.seqlen,
        given_seqlen=args.seqlen,
        seed=args.seed,
        cache_dir=args.cache_dir,
    )


def model_identity(args: argparse.Namespace, setup: Setup) -> dict[str, object]:
    """What decides every figure of a model that these flags make: settings, and the contents of what is read."""
    return {
        "model": model_fingerprint(setup.source, setup.config),
        "calibration": None if setup.tokens is None else data_fingerprint(setup.tokens),
        "activation statistics": file_digest(args.act_scales) if args.act_scales else "computed",
        **{name: str(getattr(args, name)) for name in MAKING},
    }
