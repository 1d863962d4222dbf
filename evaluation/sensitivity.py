"""Where the gap to full precision is: what every part of a quantized model costs, found by leaving it at 16 bits.

One walk measures all variants. Each has hidden states of its own, which go through every layer with the variant's part
of it unrounded; before the first layer in which a variant differs from the quantized network they are the same, so
"layer 12 at 16 bits" begins as a copy of the quantized network's states in front of layer 12.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evaluation.base import FULL, Candidate, Context, Evaluation, EvaluationError, Finding
from evaluation.perplexity import Perplexity, Windows, dataset_windows, final_hidden, score, scores
from evaluation.settings import EvaluationSettings, SensitivitySettings
from quantize.observer import Observer
from quantize.rounding import OpenLinear
from quantize.spec import DecoderSpec, InputGroup
from quantize.unrounded import ROLES, Part, left_unrounded, rounded_part
from utils import data
from utils.batching import BatchSize
from utils.device import home_of
from utils.distributed import is_main, make_tensors_equal_
from utils.io import write_text
from utils.log import meter
from utils.memory import Allocate, memory_of
from utils.results import format_table

BY_ROLE, BY_GROUP, BY_LAYER = "roles", "groups", "layers"  # kinds of variants, as results.json has them
Key = tuple[str, str | int]  # kind of a variant, and which role, group or layer it leaves at 16 bits
SHOWN = {"weight": "weights", "input": "inputs of linears", "query": "q", "key": "k", "value": "v"}


def variant_parts(index: int, spec: DecoderSpec, rounded: Part) -> dict[Key, Part]:
    """By variant what it leaves at 16 bits of layer `index`, whose spec is `spec` and of which `rounded` is rounded.

    Those that leave nothing of it are left out.
    """
    parts: dict[Key, Part] = {(BY_ROLE, role): rounded.of_role(role) for role in ROLES}
    parts |= {(BY_GROUP, group.name): rounded.of_group(group) for group in spec.groups}
    return {key: part for key, part in (parts | {(BY_LAYER, index): rounded}).items() if part}


class Variants(Observer):
    """The passenger behind the quantization that takes the windows of token ids [N, T] through all variants.

    As an observer it keeps the weights of the layer that comes next as they are before they are rounded, in the model's
    dtype. `quantized` are the windows in the quantized network, `hidden` (by variant, [n, T, C]) those in the others.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: DecoderSpec,
        tokens: Tensor,
        device: torch.device,
        batch_size: BatchSize | None = None,
        allocate: Allocate | None = None,
    ):
        self.quantized = Windows(model, spec, tokens, device, batch_size, allocate)
        self.hidden: dict[Key, Tensor] = {}
        self._spec, self._dtype, self._allocate = spec, model.dtype, allocate or memory_of(home_of(model))
        self._weights: dict[str, Tensor] = {}

    def rounding(self, group: InputGroup, path: str, linear: OpenLinear) -> None:
        """Keep the transformed weight; it is what a linear with 16-bit weights would have."""
        self._weights[path] = linear.weight.detach().to(self._dtype).contiguous()

    def visit(self, index: int, layer: nn.Module) -> None:
        """Take all states through `layer`, number `index`, which is quantized."""
        spec, weights = self._spec.at(index), self._weights
        self._weights = {}
        make_tensors_equal_(weights.values())  # what they were rounded to is the main process's as well
        parts = variant_parts(index, spec, rounded_part(layer, spec))
        for key in parts:
            if key not in self.hidden:
                self.hidden[key] = self._copy(self.quantized.hidden)
        with meter(len(self.hidden), f"variants of layer {index}", "variant", inner=True) as bar:
            for key, hidden in self.hidden.items():
                with left_unrounded(layer, spec, parts.get(key, Part()), weights):
                    self.quantized.advance_(index, layer, hidden)
                bar.update()
        self.quantized.visit(index, layer)

    def _copy(self, hidden: Tensor) -> Tensor:
        return self._allocate(hidden.shape, hidden.dtype).copy_(hidden) if len(hidden) else hidden


class Sensitivity(Evaluation):
    """Perplexity and KL divergence of every variant of the run's own model, on the first windows of one dataset.

    The full-precision model is measured first: what it gives before its head is kept for the others.
    """

    KEY = "result"  # in the journal
    teaches = True

    def __init__(self, settings: SensitivitySettings, context: Context, common: EvaluationSettings):
        super().__init__(settings.STAGE, settings)
        dataset = common.perplexity.test_dataset[0]
        self.label, self.context, self._batch = data.dataset_label(dataset), context, common.eval_batch_size
        self.tokens = dataset_windows(dataset, context)[: common.limit][: settings.sensitivity_windows]
        self.windows = tuple(self.tokens.shape)
        groups = {group.name for each in (context.spec.groups, *context.spec.special.values()) for group in each}
        self.variants = (1 + len(ROLES) + len(groups), context.config.num_hidden_layers)  # at most
        self._teacher: Tensor | None = None
        self._full: Perplexity | None = None

    def identity(self) -> dict[str, object]:
        """The tokens."""
        return {"tokens": data.data_fingerprint(self.tokens)}

    def for_comparison(self, shown: bool) -> bool:
        """The gap is that to the full-precision model, shown or not."""
        return True

    def rides(self, candidate: Candidate) -> bool:
        """The journal lacks the result, of the run's own model in any case: the full one has none but for it."""
        return self.KEY not in (candidate.student if candidate.row == FULL else candidate.journal)

    def passenger(self, model: nn.Module, candidate: Candidate, allocate: Allocate | None) -> Windows | Variants:
        """The windows, and for a quantized model those of all variants, before the first layer."""
        kind = Windows if candidate.row == FULL else Variants
        return kind(model, self.context.spec, self.tokens, self.context.device, self._batch_size(), allocate)

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """The result from the journal, or from windows that went through the layers while they were quantized."""
        if candidate.row == FULL:
            if self.rides(candidate):
                self._learn(model, candidate)
            return
        if self.rides(candidate):
            candidate.journal.keep(self.KEY, self._measure(model, candidate))
        result = candidate.journal.get(self.KEY)
        table = sensitivity_table(result)
        if is_main():
            write_text(candidate.folder / "sensitivity" / f"{candidate.row}.md", table + "\n")
        yield Finding({"sensitivity": result}, table, shown=True)

    def _learn(self, model: nn.Module, candidate: Candidate) -> None:
        """Keep what the full-precision model makes of the windows."""
        spec, tokens, device = self.context.spec, self.tokens, self.context.device
        if candidate.walked is None:
            self._teacher = final_hidden(model, spec, tokens, device, self.name, self._batch_size())
        else:
            self._teacher = candidate.walked.hidden
        self._full = score(model, spec, tokens, self._teacher, device)

    def _measure(self, model: nn.Module, candidate: Candidate) -> dict:
        """The result as results.json has it."""
        walked = candidate.walked
        if self._full is None or not isinstance(walked, Variants):
            raise EvaluationError("needs the full-precision model, and to be there while the layers are quantized")
        states = [walked.quantized.hidden, *walked.hidden.values()]
        quantized, *others = scores(model, self.context.spec, self.tokens, states, self.context.device, self._teacher)
        return sensitivity_results(self.label, self._full, quantized, dict(zip(walked.hidden, others, strict=True)))

    def _batch_size(self) -> BatchSize:
        return BatchSize.choose(self._batch, self.tokens.shape[1], self.context.device)


def sensitivity_results(
    dataset: str, full: Perplexity, quantized: Perplexity, variants: dict[Key, Perplexity]
) -> dict[str, object]:
    """What results.json says: by kind and name the figures of every variant, with what it removes of the gap.

    `share`: of that in log perplexity; `divergence_share`: of the KL divergence, which is seldom hidden by chance.
    """

    def figures(measured: Perplexity) -> dict[str, float | None]:
        return {
            "perplexity": measured.perplexity,
            "nats": measured.nats,
            "divergence": measured.divergence,
            "share": gap_share(measured.nats, quantized.nats, full.nats),
            "divergence_share": gap_share(measured.divergence, quantized.divergence, 0.0),
        }

    def of_kind(kind: str) -> dict[str, dict]:
        return {name: figures(measured) for (each, name), measured in variants.items() if each == kind}

    return {
        "dataset": dataset,
        "windows": full.windows,
        "tokens_per_window": full.tokens_per_window,
        "full_precision": {"perplexity": full.perplexity, "nats": full.nats},
        "quantized": {"perplexity": quantized.perplexity, "nats": quantized.nats, "divergence": quantized.divergence},
        BY_ROLE: of_kind(BY_ROLE),
        BY_GROUP: of_kind(BY_GROUP),
        BY_LAYER: [{"layer": index, **each} for index, each in of_kind(BY_LAYER).items()],
    }


def gap_share(variant: float, quantized: float, full: float) -> float | None:
    """(quantized − variant) / (quantized − full), of log perplexities or divergences: 1 where all of it is removed.

    None where quantization has cost nothing that could be shared.
    """
    gap = quantized - full
    return (quantized - variant) / gap if gap > 0 and math.isfinite(gap) else None


def sensitivity_table(result: dict) -> str:
    """The result as Markdown, a row per variant."""
    rows = [("nothing", result["quantized"]), ("everything", result["full_precision"])]
    rows += [(SHOWN[role], each) for role, each in result[BY_ROLE].items()]
    rows += [(f"group {name}", each) for name, each in result[BY_GROUP].items()]
    rows += [(f"layer {each['layer']}", each) for each in result[BY_LAYER]]
    header = ["left at 16 bits", f"{result['dataset']} ppl", "KL", "gap removed", "KL removed"]
    return format_table(header, [[name, *_cells(each)] for name, each in rows])


def _cells(figures: dict) -> list[str]:
    shares = [figures.get(name) for name in ("share", "divergence_share")]
    return [
        *("–" if figures.get(name) is None else f"{figures[name]:.4f}" for name in ("perplexity", "divergence")),
        *("–" if share is None else f"{100 * share:.1f} %" for share in shares),
    ]
