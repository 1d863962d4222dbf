"""Perplexity and KL divergence, one decoder layer on the device at a time: no more memory than quantizing needed.

The windows of tokens are a passenger of a walk over the layers, alone (`final_hidden`) or beside others (`Windows`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.base import FULL, Candidate, Context, Evaluation, Finding
from evaluation.settings import EvaluationSettings, PerplexitySettings
from quantize.observe import advance_, head_logits, layer_calls, shell_on_device, tokens_at_once
from quantize.spec import DecoderSpec
from quantize.walk import fit_, layers_in_memory, walk
from utils import data
from utils.batching import BatchSize
from utils.distributed import own_part, together
from utils.errors import InputError
from utils.memory import Allocate


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of the mean token loss, that loss in nats, and what it was measured on.

    `divergence` is the mean over tokens of KL(full precision ‖ this model), in nats, where that was asked for.
    """

    perplexity: float
    nats: float
    windows: int
    tokens_per_window: int
    divergence: float | None = None

    def __str__(self) -> str:
        divergence = "" if self.divergence is None else f", KL {self.divergence:.4f} nats"
        counted = f"{self.windows} windows of {self.tokens_per_window} tokens"
        return f"perplexity {self.perplexity:.4f} ({self.nats:.4f} nats{divergence}, {counted})"


def perplexity(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    device: torch.device,
    label: str = "perplexity",
    batch_size: BatchSize | None = None,
) -> Perplexity:
    """Perplexity of `model` on windows of token ids [N, T]; every window predicts its tokens 1…T−1."""
    return score(model, spec, tokens, final_hidden(model, spec, tokens, device, label, batch_size), device)


class Windows:
    """Windows of token ids [N, T] on their way through the decoder layers of `model`; `visit` them in order.

    `hidden` [n, T, C] is what the last layer that was visited gives, before the final norm. Several
    processes share the windows: each has the part that is its own. The layers need no weights before they are visited.
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
        own = own_part(tokens)
        self._calls = layer_calls(model, spec, own, device, allocate) if len(own) else None
        self._spec, self._device, self._batch_size = spec, device, batch_size

    @property
    def hidden(self) -> Tensor:
        """What the last layer gave; empty for a process that has no window."""
        return torch.empty(0) if self._calls is None else self._calls.hidden

    def visit(self, index: int, layer: nn.Module) -> None:
        """Replace `hidden` by what `layer`, number `index`, on the device, makes of it."""
        self.advance_(index, layer, self.hidden)

    def advance_(self, index: int, layer: nn.Module, hidden: Tensor) -> None:
        """The same with other states of these windows, those of a variant of the network."""
        if self._calls is not None:
            if self._batch_size is not None:
                fit_(self._batch_size, layer, self._spec.at(index), hidden, self._device)
            advance_(layer, hidden, self._calls.kwargs[index], self._device, self._batch_size)


def final_hidden(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    device: torch.device,
    label: str,
    batch_size: BatchSize | None = None,
) -> Tensor:
    """`Windows.hidden` of windows of token ids [N, T] that go alone through a model that is there as a whole."""
    windows = Windows(model, spec, tokens, device, batch_size)
    walk(layers_in_memory(model, spec, device), [windows], len(spec.decoder_layers(model)), label)
    return windows.hidden


def score(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    hidden: Tensor,
    device: torch.device,
    teacher: Tensor | None = None,
) -> Perplexity:
    """Perplexity on windows [N, T] whose `final_hidden` is known; every process has the result.

    `teacher` is the `final_hidden` of the full-precision model on the same windows: with it the divergence is measured.
    """
    return scores(model, spec, tokens, [hidden], device, teacher)[0]


def scores(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    variants: Sequence[Tensor],
    device: torch.device,
    teacher: Tensor | None = None,
) -> list[Perplexity]:
    """The `score` of each of several variants of a model, given by what their last layers made of the windows."""
    part = own_part(tokens)
    shares = together(lambda: _window_means(model, spec, part, variants, teacher, device))
    results = []
    for nats, divergence in torch.cat(shares, dim=1).mean(dim=1).tolist():
        perplexity = math.exp(nats) if nats < 700 else math.inf
        results.append(Perplexity(perplexity, nats, *tokens.shape, None if teacher is None else divergence))
    return results


@torch.no_grad()
def _window_means(
    model: nn.Module,
    spec: DecoderSpec,
    tokens: Tensor,
    variants: Sequence[Tensor],
    teacher: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Mean token loss of every window, and mean KL divergence from the teacher (NaN without one): float64 [V, N, 2].

    Logits are the largest tensors of all: those of one window of one variant, in as many parts as its vocabulary asks
    for (`tokens_at_once`).
    """
    predicted = tokens.shape[1] - 1
    size = tokens_at_once(model.config.vocab_size)
    means = torch.zeros(len(variants), len(tokens), 2, dtype=torch.float64, device=device)
    if teacher is None:
        means[:, :, 1] = math.nan

    def logits_of(hidden: Tensor, part: slice) -> Tensor:
        return head_logits(model, spec, window[None, part], hidden[index, None, part].to(device))[0].float()

    with shell_on_device(model, spec, device):
        for index, window in enumerate(tokens.to(device)):
            for part in (slice(start, min(start + size, predicted)) for start in range(0, predicted, size)):
                wanted, share = (
                    None if teacher is None else logits_of(teacher, part),
                    (part.stop - part.start) / predicted,
                )
                for mean, hidden in zip(means[:, index], variants, strict=True):
                    logits = logits_of(hidden, part)
                    mean[0] += share * F.cross_entropy(logits, window[1:][part]).double()
                    if wanted is not None:
                        mean[1] += share * token_divergence(wanted, logits).mean().double()
    return means.cpu()


def token_divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """KL(P ‖ Q) = Σ P (log P − log Q) of every token, in nats: logits [T, vocabulary] of P and of Q → [T].

    Two tensors as large as they are made, and no more.
    """
    wanted, difference = wanted.log_softmax(-1), logits.log_softmax(-1)
    torch.sub(wanted, difference, out=difference)
    return wanted.exp_().mul_(difference).sum(-1)


class WindowPerplexity(Evaluation):
    """Perplexity of every candidate on the windows [N, T] of one dataset.

    With `divergence` also how far it is from the full-precision model, which is measured first: what that gives before
    its head is kept for the others.
    """

    KEY = "result"  # in the journal

    def __init__(self, label: str, tokens: Tensor, settings: PerplexitySettings, context: Context, batch: int | None):
        super().__init__(f"perplexity {label}", settings)
        self.label, self.tokens, self.context = label, tokens, context
        self.windows, self.teaches = tuple(tokens.shape), settings.eval_kl
        self._batch, self._teacher = batch, None

    def identity(self) -> dict[str, object]:
        """The tokens, and whether the divergence is wanted too."""
        return {"tokens": data.data_fingerprint(self.tokens), "divergence": self.teaches}

    def for_comparison(self, shown: bool) -> bool:
        """The divergence needs the full-precision model, shown or not."""
        return shown or self.teaches

    def rides(self, candidate: Candidate) -> bool:
        """The journal lacks its result, or that of what is compared with it."""
        return self.KEY not in candidate.journal or self._teaches_now(candidate)

    def passenger(self, model: nn.Module, candidate: Candidate, allocate: Allocate | None) -> Windows:
        """The windows, before the first layer."""
        context = self.context
        return Windows(model, context.spec, self.tokens, context.device, self._batch_size(), allocate)

    def run(self, model: nn.Module, candidate: Candidate) -> Iterator[Finding]:
        """The result from the journal, or from windows that went through the layers, now if not before."""
        if self.rides(candidate):
            result = self._measure(model, candidate)
            candidate.journal.keep(self.KEY, asdict(result))
        else:
            result = Perplexity(**candidate.journal.get(self.KEY))
        results = {"perplexity": {self.label: result.perplexity}, "perplexity_details": {self.label: asdict(result)}}
        yield Finding(results, f"{self.label}: {result}")

    def _measure(self, model: nn.Module, candidate: Candidate) -> Perplexity:
        spec, tokens, device = self.context.spec, self.tokens, self.context.device
        if candidate.walked is None:
            hidden = final_hidden(model, spec, tokens, device, f"{self.label} perplexity", self._batch_size())
        else:
            hidden = candidate.walked.hidden
        result = score(model, spec, tokens, hidden, device, self._teacher)
        if self._teaches_now(candidate):
            self._teacher = hidden
        return result

    def _teaches_now(self, candidate: Candidate) -> bool:
        """Whether what the candidate gives is still needed to compare the run's own model with."""
        return self.teaches and candidate.row == FULL and self.KEY not in candidate.student

    def _batch_size(self) -> BatchSize:
        return BatchSize.choose(self._batch, self.tokens.shape[1], self.context.device)


def dataset_windows(dataset: str, context: Context) -> Tensor:
    """The windows of token ids [N, T] of one `--test_dataset`. Raises InputError for its text."""
    return data.test_tokens(
        dataset,
        context.tokenizer,
        seqlen=context.given_seqlen if data.is_token_file(dataset) else context.seqlen,
        cache_dir=context.cache_dir,
        vocab_size=context.config.vocab_size,
        bos=context.bos,
    )


def open_perplexities(
    settings: PerplexitySettings, context: Context, common: EvaluationSettings
) -> list[WindowPerplexity]:
    """One evaluation for every dataset, on the first `--limit` of its windows. Raises InputError for its text."""
    tokens: dict[str, Tensor] = {}
    for dataset in settings.test_dataset:
        label = data.dataset_label(dataset)
        if label in tokens:
            raise InputError(f"--test_dataset: two of them would be called {label}; rename a file or drop one")
        tokens[label] = dataset_windows(dataset, context)[: common.limit]
    batch = common.eval_batch_size
    return [WindowPerplexity(label, windows, settings, context, batch) for label, windows in tokens.items()]
