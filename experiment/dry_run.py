"""`--dry_run`: what a run would do and need, from shapes alone, and the reason if it cannot work."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from experiment.estimate import Estimate, Plan, estimate, probe_tokens, work_of
from experiment.prepare import Prepared as Run
from experiment.rates import measure_rates, stage_seconds
from quantize.build import absorbers, describe_folding
from quantize.settings import QuantSettings, Transform
from quantize.spec import DecoderSpec
from utils.capacity import free_device_memory, free_disk
from utils.device import describe
from utils.errors import InputError
from utils.log import RESULT
from utils.memory import available_memory
from utils.results import format_table

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


def dry_run(run: Run) -> None:
    """Log what `run` would do and need. Raises InputError, naming everything that is missing, if it cannot work."""
    setup, args, streamed = run.setup, run.args, run.shards is not None
    plan = make_plan(run)
    found = estimate(setup.skeleton, setup.spec, run.quant, plan)
    logger.log(RESULT, "dry run: no weights are loaded, and nothing is written beside the token cache")
    logger.log(
        RESULT,
        "%s: %s, %d layers, %.3f B parameters, %s on %s",
        *(setup.source.name, setup.config.model_type, found.layers, found.parameters / 1e9),
        *(str(setup.dtype).removeprefix("torch."), describe(setup.device)),
    )
    if setup.saved is None:
        logger.log(RESULT, "calibration on %d×%d tokens", *plan.calibration)
        logger.log(RESULT, "%s\n\n%s\n", describe_bits(run.quant), group_table(setup.skeleton, setup.spec, run.quant))
    else:
        logger.log(RESULT, "quantized already (%s): it is only evaluated\n", run.quant.label)
    needs = memory_needs(found, plan.on_gpu, streamed, available_memory(), free_device_memory(setup.device))
    needs += disk_needs(found, {"--save_dir": args.save_dir, "--save_model": args.save_model})
    logger.log(RESULT, "%s\n", need_table(found, needs))
    logger.log(RESULT, "%s\n", time_table(run, plan))
    refuse(needs)


def make_plan(run: Run) -> Plan:
    """What a checked run does, as the estimate wants it."""
    setup, evaluations = run.setup, run.evaluations
    statistics = run.quant.smooth is not None and run.args.act_scales is None
    compared = evaluations.for_comparison(run.args.report)
    return Plan(
        dtype=setup.dtype,
        on_gpu=setup.device.type == "cuda",
        calibration=(0, setup.seqlen) if setup.tokens is None else tuple(setup.tokens.shape),
        windows=evaluations.windows,
        statistics=setup.saved is None and statistics,
        models=2 if compared.windows else 1,
        divergence=bool(evaluations.teaching().members),
        whole=evaluations.need_whole_model and not evaluations.spread,
    )


def describe_bits(config: QuantSettings) -> str:
    """One line on what is rounded to what."""
    if config.bits.untouched:
        return "16-bit weights and activations: nothing is quantized"
    vector = f"group of {config.bits.group_size}" if config.bits.group_size else "output channel"
    kind = "symmetric" if config.bits.symmetric else "asymmetric"
    clipping = "trained" if config.clip.learned else config.clip.weight_ratio or "none"
    return (
        f"weights {config.bits.weight} bits per {vector}, {kind}, clipping {clipping}; linear inputs per token and "
        f"q, k, v per token and head {config.bits.activation} bits, clipping {config.clip.activation_ratio or 'none'}"
    )


def group_table(skeleton: nn.Module, spec: DecoderSpec, config: QuantSettings) -> str:
    """Every input group: its layers, linears, width, blocks, and where its smoothing scale goes."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for index, layer in enumerate(spec.decoder_layers(skeleton)):
        for group in spec.at(index).groups:
            width = layer.get_submodule(group.linears[0]).in_features
            block = config.rotation.block_size_for(width) if config.transform is not Transform.NONE else None
            blocks = ("–", "–") if block is None else (str(block), str(width // block))
            scale = describe_folding(absorbers(group, config.smooth)) if config.smooth else "none"
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


def memory_needs(found: Estimate, on_gpu: bool, streamed: bool, host: int | None, device: int | None) -> list[Need]:
    """Host and GPU memory against the bytes `host` and `device` have free."""
    smaller = "lower --nsamples, or use a machine with more memory"
    if not streamed and host is not None and found.host_streamed <= host:
        smaller = "read its layers one by one with --stream"
    needs = [Need("host memory", found.host_streamed if streamed else found.host, host, smaller)]
    if on_gpu:
        needs.append(Need("GPU memory", found.device, device, "lower --seqlen, or use another --device"))
    return needs


def disk_needs(found: Estimate, folders: Mapping[str, Path | None]) -> list[Need]:
    """What `--save_dir` and `--save_model` write, against what is free; folders of one disk share it."""
    sizes = {"--save_dir": found.save_dir, "--save_model": found.save_model}
    taken: dict[int, int] = {}
    needs = []
    for flag, folder in folders.items():
        if folder is not None:
            disk, free = free_disk(folder)
            needs.append(Need(f"{flag} {folder}", sizes[flag], free - taken.get(disk, 0), "choose another disk"))
            taken[disk] = taken.get(disk, 0) + sizes[flag]
    return needs


def need_table(found: Estimate, needs: list[Need]) -> str:
    """Sizes of the model's parts, and every need beside what there is."""
    parts = {
        "weights": found.weights,
        "one decoder layer, float32": found.layer_wide,
        "embeddings and head": found.shell,
        "hidden states, calibration": found.calibration_hidden,
        "hidden states, evaluation": found.evaluation_hidden,
        "host memory, whole model in it": found.host,
        "host memory, layers read one by one": found.host_streamed,
        "checkpoint (--save_dir)": found.save_dir,
        "quantized model (--save_model)": found.save_model,
    }
    rows = [[name, size(value), ""] for name, value in parts.items()]
    rows += [[need.what, size(need.needed), "?" if need.available is None else size(need.available)] for need in needs]
    return format_table(["what", "bytes", "free"], rows)


def time_table(run: Run, plan: Plan) -> str:
    """Seconds by stage at the rates this machine has now."""
    setup = run.setup
    work = work_of(setup.skeleton, setup.spec, run.quant, plan)
    rates = measure_rates(setup.device, setup.dtype, work.steps, probe_tokens(run.quant, plan), run.quant.rotation)
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
