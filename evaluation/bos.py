"""A look at a few test windows behind BOS: some families are lost without it, and then every figure is of a lost model.

It is for the full-precision model alone. A quantized model can be bad for other reasons, so a run that does not measure
full precision says nothing.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from evaluation.base import Candidate, Context, Evaluation, Finding
from evaluation.perplexity import WindowPerplexity, Windows, score
from evaluation.settings import EvaluationSettings, PerplexitySettings
from quantize.walk import layers_in_memory, walk
from utils import data
from utils.batching import BatchSize
from utils.memory import Allocate

CHECKED = 4  # windows: enough to tell a lost model, and little beside the hundreds of a test text
FAR_BETTER = 0.8  # a healthy model was 1 to 11% worse behind BOS, on three small ones; of a Gemma 3 the ratio is 0.36
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BosEffect:
    """Perplexity on `windows` windows as they are measured, and on the same behind BOS, without their last token."""

    perplexity: float
    perplexity_with_bos: float
    windows: int

    @property
    def far_better(self) -> bool:
        """Whether the model is lost without BOS; never if a perplexity is NaN or both are infinite."""
        return self.perplexity_with_bos < FAR_BETTER * self.perplexity


def windows_without(tokens: Tensor, bos: int) -> Tensor:
    """The first few of the windows [N, T] that do not begin with BOS: [at most CHECKED, T]."""
    return tokens[tokens[:, 0] != bos][:CHECKED]


def behind_bos(windows: Tensor, bos: int) -> Tensor:
    """Windows [n, T] with BOS before each and its last token dropped, as `--add_bos always` would have them: [n, T]."""
    return torch.cat([windows.new_full((len(windows), 1), bos), windows[:, :-1]], dim=1)


class BothWays:
    """The same windows with and without BOS, on their way through the layers; `visit` them in order."""

    def __init__(self, without: Windows, behind: Windows):
        self.without, self.behind = without, behind

    def visit(self, index: int, layer: nn.Module) -> None:
        """Layer `index` is on the device."""
        self.without.visit(index, layer)
        self.behind.visit(index, layer)


class BosCheck(Evaluation):
    """Warns if full precision is far better on `windows` [n, T] behind BOS. The windows travel by themselves.

    So no other figure changes, not by the composition of a batch either. `remedy`: what to do, for the warning.
    """

    KEY = "result"  # in the journal
    advises = True

    def __init__(
        self,
        label: str,
        windows: Tensor,
        bos: int,
        remedy: str,
        settings: PerplexitySettings,
        context: Context,
        batch: int | None,
    ):
        super().__init__(f"BOS check {label}", settings)
        self.label, self.remedy, self.context = label, remedy, context
        self.tokens = (windows, behind_bos(windows, bos))
        self.windows = (2 * len(windows), windows.shape[1])
        self._shown, self._batch = settings.eval_kl, batch

    def identity(self) -> dict[str, object]:
        """The windows both ways."""
        return {"tokens": [data.data_fingerprint(tokens) for tokens in self.tokens]}

    def for_comparison(self, shown: bool) -> bool:
        """Wherever perplexity of the full-precision model is measured: for a report, or for the divergence."""
        return shown or self._shown

    def rides(self, candidate: Candidate) -> bool:
        """The model is in full precision, and the journal lacks the result."""
        return candidate.full and self.KEY not in candidate.journal

    def passenger(self, model: nn.Module, candidate: Candidate, allocate: Allocate | None) -> BothWays:
        """The windows, before the first layer."""
        context = self.context
        batch = BatchSize.choose(self._batch, self.windows[1], context.device)
        return BothWays(
            *(Windows(model, context.spec, tokens, context.device, batch, allocate) for tokens in self.tokens)
        )

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """Nothing for a quantized model; else the two perplexities, and the warning or None."""
        if not candidate.full:
            return
        if self.rides(candidate):
            effect = self._measure(model, candidate)
            candidate.journal.keep(self.KEY, asdict(effect))
        else:
            effect = BosEffect(**candidate.journal.get(self.KEY))
        warning = self.warning(effect)
        if warning is not None:
            logger.warning("%s", warning)
        yield Finding({"bos_check": {self.label: {**asdict(effect), "warning": warning}}})

    def warning(self, effect: BosEffect) -> str | None:
        """One line with both figures and what to do, if the model is lost."""
        if not effect.far_better:
            return None
        return (
            f"{self.label}: without BOS the model is lost: full precision has perplexity {effect.perplexity:.2f} on "
            f"{effect.windows} windows as they are and {effect.perplexity_with_bos:.2f} behind BOS; {self.remedy}"
        )

    def _measure(self, model: nn.Module, candidate: Candidate) -> BosEffect:
        spec, device, walked = self.context.spec, self.context.device, candidate.walked
        if walked is None:
            walked, layers = self.passenger(model, candidate, None), layers_in_memory(model, spec, device)
            walk(layers, [walked], len(spec.decoder_layers(model)), self.name)
        ways = zip(self.tokens, (walked.without, walked.behind), strict=True)
        without, behind = (score(model, spec, tokens, way.hidden, device) for tokens, way in ways)
        return BosEffect(without.perplexity, behind.perplexity, without.windows)


def open_bos_checks(
    perplexities: Sequence[WindowPerplexity],
    settings: PerplexitySettings,
    context: Context,
    common: EvaluationSettings,
) -> list[BosCheck]:
    """One for every test set (in the order of `--test_dataset`) that has windows without BOS, if there is a BOS."""
    checks = []
    for dataset, each in zip(settings.test_dataset, perplexities, strict=True):
        windows = each.tokens[:0] if context.bos is None else windows_without(each.tokens, context.bos.token)
        if len(windows):
            remedy = "make the file's windows with BOS" if data.is_token_file(dataset) else "give --add_bos always"
            batch = common.eval_batch_size
            checks.append(BosCheck(each.label, windows, context.bos.token, remedy, settings, context, batch))
    return checks
