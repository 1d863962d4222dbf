"""`--dry_run`: what a run would do and need, from shapes alone, and the reason if it cannot work."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from duquant.formats import BLOCK_FORMATS
from duquant.scheme import TensorScheme
from experiment.estimate import Estimate, Plan, estimate, probe_tokens
from experiment.prepare import Prepared
from experiment.residence import Residence, choose_residence
from experiment.setup import Setup
from experiment.work import measure_rates, stage_seconds, work_of
from quantize.build import absorbers, describe_folding
from quantize.quantization import other_blocks
from quantize.rotation_settings import Transform
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec
from utils.capacity import free_device_memory, free_disk
from utils.device import describe
from utils.errors import InputError
from utils.log import RESULT
from utils.memory import available_memory, too_large
from utils.results import format_table

HEADS = ("query", "key", "value")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """One thing the run takes: bytes needed, bytes there are (None: unknown), and what to do if that is too little."""

    what: str
    needed: int
    available: int | None
    remedy: str = ""

    @property
    def problem(self) -> str | None:
        """In words, what is missing; None if nothing is."""
        if self.available is None or self.needed <= self.available:
            return None
        return f"{self.what}: {size(self.needed)} are needed, {size(self.available)} are free; {self.remedy}"


def dry_run(prepared: Prepared) -> None:
    """Log what the run would do and need, and what is missing for it.

    Raises InputError, naming everything that does not fit, if it cannot work here.
    """
    setup, quant, output = prepared.setup, prepared.quant, prepared.settings.output
    plan = prepared.plan
    needed = estimate(setup.skeleton, setup.spec, quant, plan)
    logger.log(RESULT, "dry run: no weights are loaded, and nothing is written beside the token cache")
    logger.log(
        RESULT,
        "%s: %s, %d layers, %.3f B parameters, %s on %s",
        *(setup.source.name, setup.config.model_type, needed.layers, needed.parameters / 1e9),
        *(str(setup.dtype).removeprefix("torch."), describe(setup.device)),
    )
    if setup.saved is not None:
        logger.log(RESULT, "quantized already (%s): it is only evaluated\n", quant.label)
    elif quant.bits.untouched:
        logger.log(RESULT, "16-bit weights and activations: nothing is quantized\n")
    else:
        logger.log(RESULT, "calibration on %d×%d tokens", *setup.calibration)
        logger.log(RESULT, "%s\n\n%s\n", describe_bits(quant), group_table(setup.skeleton, setup.spec, quant))
        blocks = other_blocks(setup.skeleton, setup.spec, quant)
        if blocks is not None:
            logger.log(RESULT, "%s\n", blocks)
    host, device = available_memory(), free_device_memory(setup.device)
    kept = choose_residence(setup.model.keep, needed, device, prepared.stays_whole)
    if device is not None:
        logger.log(RESULT, "kept on the GPU between their uses: %s\n", kept)
    in_files = needed.hidden if not kept.states and too_large(needed.hidden, host) else 0
    needs = memory_needs(needed, prepared.shards is not None, in_files, host, device, kept)
    folders = {
        "--save_dir": (output.save_dir, needed.checkpoint),
        "--save_model": (output.save_model, needed.quantized),
        "--export": (output.export, needed.quantized),
        "hidden states in --cache_dir": (setup.model.cache_dir if in_files else None, in_files),
    }
    needs += disk_needs(folders)
    logger.log(RESULT, "%s\n", need_table(needed, needs))
    logger.log(RESULT, "%s\n", time_table(setup, quant, plan, kept))
    if prepared.missing:
        logger.log(RESULT, "missing for a real run (evaluations without their data are not counted above):")
    for line in prepared.missing:
        logger.log(RESULT, "  %s", line)
    refuse(needs)


def describe_bits(settings: QuantSettings) -> str:
    """One line on what is rounded to what."""
    scheme = settings.scheme
    heads = "; ".join(f"{role[0]} {describe_scheme(getattr(scheme, role), 'head')}" for role in HEADS)
    if len({getattr(scheme, role) for role in HEADS}) == 1:
        heads = f"q, k, v {describe_scheme(scheme.query, 'head')}"
    weights = describe_scheme(scheme.weight, "output channel")
    trained = ", clipping trained" if settings.training is not None and scheme.weight.quantized else ""
    return f"weights {weights}{trained}; linear inputs {describe_scheme(scheme.input, 'token')}; {heads}"


def describe_scheme(scheme: TensorScheme, vector: str) -> str:
    """`4 bits per token, asymmetric, clipping 0.9`; a `vector` has a range of its own, or groups of it have."""
    if not scheme.quantized:
        return "16 bits"
    clip = f", clipping {scheme.clip}" if scheme.clip else ""
    if scheme.format in BLOCK_FORMATS:
        return f"{scheme.format} in blocks of {scheme.group_size}{clip}"
    vector = f"group of {scheme.group_size}" if scheme.group_size else vector
    return f"{scheme.bits} bits per {vector}, {scheme.kind_of_range}{clip}"


def group_table(skeleton: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> str:
    """Every input group: its layers, linears, width, blocks, and where its smoothing scale goes."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, layer in enumerate(spec.decoder_layers(skeleton)):
        for group in spec.at(index).groups:
            width = layer.get_submodule(group.linears[0]).in_features
            block = settings.rotation.block_size_for(width) if settings.transform is not Transform.NONE else None
            blocks = ("–", "–") if block is None else (str(block), str(width // block))
            scale = describe_folding(absorbers(group, settings.smooth)) if settings.smooth else "none"
            row = (group.name, short_names(group.linears), str(width), *blocks, scale)
            rows.setdefault(row, []).append(index)
    header = ["group", "layers", "linears", "width", "block size", "blocks", "smoothing scale"]
    return format_table(header, [[row[0], number_ranges(layers), *row[1:]] for row, layers in rows.items()])


def short_names(paths: Iterable[str]) -> str:
    """`q_proj, k_proj, v_proj`; names that several paths end in are counted: `down_proj ×8`."""
    names = [path.rpartition(".")[2] for path in paths]
    counted = {name: names.count(name) for name in names}
    return ", ".join(name if number == 1 else f"{name} ×{number}" for name, number in counted.items())


def number_ranges(numbers: list[int]) -> str:
    """Rising numbers with runs written as ranges: [0, 1, 2, 5] → `0–2, 5`."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))


def memory_needs(
    needed: Estimate, streamed: bool, in_files: int, host: int | None, device: int | None, kept: Residence
) -> list[Need]:
    """Host and GPU memory against the bytes `host` and `device` have free (None: unknown, and no GPU).

    Of the hidden states so many bytes live `in_files`, and some of all may be `kept` on the GPU.
    """
    elsewhere = needed.states + needed.pinned if kept.states else in_files
    whole, layers = max(needed.host - elsewhere, needed.held), needed.host_streamed - elsewhere
    smaller = "lower --nsamples, or use a machine with more memory"
    if not streamed and host is not None and layers <= host:
        smaller = "read its layers one by one with --stream"
    needs = [Need("host memory", layers if streamed else whole, host, smaller)]
    if needed.device:
        remedy = "say --keep host" if kept.states else "lower --seqlen, or use another --device"
        needs.append(Need("GPU memory", kept.needed, device, remedy))
    return needs


def disk_needs(folders: Mapping[str, tuple[Path | None, int]]) -> list[Need]:
    """What is written into the folders of these flags, against what is free; folders of one disk share it."""
    taken: dict[int, int] = {}
    needs = []
    for flag, (folder, needed) in folders.items():
        if folder is not None:
            disk, free = free_disk(folder)
            needs.append(Need(f"{flag} {folder}", needed, free - taken.get(disk, 0), "choose another disk"))
            taken[disk] = taken.get(disk, 0) + needed
    return needs


def need_table(needed: Estimate, needs: list[Need]) -> str:
    """Sizes of the model's parts, and every need beside what there is."""
    parts = {
        "weights": needed.weights,
        "one decoder layer, float32": needed.layer_wide,
        "embeddings and head": needed.shell,
        "quantized model, as it is held": needed.quantized,
        "hidden states that travel at once": needed.hidden,
        "host memory, whole model in it": needed.host,
        "host memory, layers read one by one": needed.host_streamed,
        "checkpoint (--save_dir)": needed.checkpoint,
    }
    rows = [[name, size(value), ""] for name, value in parts.items()]
    rows += [[need.what, size(need.needed), "?" if need.available is None else size(need.available)] for need in needs]
    return format_table(["what", "bytes", "free"], rows)


def time_table(setup: Setup, quant: QuantSettings, plan: Plan, kept: Residence) -> str:
    """Seconds by stage at the rates this machine has now."""
    work = work_of(setup.skeleton, setup.spec, quant, plan, kept.states, kept.weights)
    rates = measure_rates(setup.device, setup.dtype, work.steps, probe_tokens(quant, plan), quant.rotation)
    seconds = stage_seconds(work, rates)
    rows = [[stage, duration(value)] for stage, value in {**seconds, "all": sum(seconds.values())}.items() if value]
    return format_table([f"time, rough ({rates.operations / 1e12:.2g} TFLOP/s)", "h:min:s"], rows)


def refuse(needs: Iterable[Need]) -> None:
    """Raise InputError with every problem, if there is one."""
    problems = [need.problem for need in needs if need.problem]
    if problems:
        raise InputError(f"this run cannot work here: {'; '.join(problems)}")


def size(number: float) -> str:
    """Bytes for people: `13.5 GB`, `830 MB`."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """`1:02:03`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
