"""What flows from layer to layer while a model is quantized: the probe, and calibration samples."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from duquant.linear import expanded
from quantize.observe import advance_, known_outputs, layer_output, parts_of_samples
from quantize.samples import GroupRows, KnownOutputs, LayerView, viewed
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec, InputGroup
from utils.ferry import Ferry
from utils.memory import Allocate, in_memory


@dataclass
class LayerInputs:
    """What flows from layer to layer.

    `probe` [P, T, C] and `kwargs`, the layer's other arguments, are on the layer's device. `teacher` and `student`
    [n, T, C], the calibration samples in the full-precision and in the quantized network, are on the host or there too,
    advanced in place, and None where nothing needs them. Of the `total` samples each process has its part. `allocate`
    makes what is as large as they are.
    """

    probe: Tensor
    kwargs: dict
    teacher: Tensor | None = None
    student: Tensor | None = None
    total: int = 0
    allocate: Allocate = in_memory

    def advance_teacher_(self, layer: nn.Module) -> None:
        """Bring the full-precision network's samples behind `layer`, which is still in full precision."""
        if self.teacher is not None:
            advance_(layer, self.teacher, self.kwargs, self.probe.device)

    def advance_(
        self, layer: nn.Module, probed: Mapping[str, Tensor] | None = None, known: KnownOutputs | None = None
    ) -> None:
        """Bring the quantized network's samples, and the probe, behind `layer`, which is quantized.

        `known` has what modules give for the samples, as far as that is known already, and `probed` for the probe.
        """
        with known_outputs(layer, probed or {}, known.attention if known else ""):
            self.probe = layer_output(layer, self.probe, self.kwargs)
        if known is not None and known.outputs:
            with expanded(layer), Ferry(self.probe.device) as ferry:
                for part, batch in known.batches(layer, self.student, ferry):
                    ferry.give_back(self.student, part, layer_output(layer, batch, self.kwargs))
        elif self.student is not None:
            advance_(layer, self.student, self.kwargs, self.probe.device)

    def view(self, layer: nn.Module, spec: DecoderSpec, settings: QuantSettings) -> LayerView:
        """What the samples show of `layer`, in full precision: the teacher's, if any, which then are behind it."""
        hidden = self.student if self.teacher is None else self.teacher
        centered = settings.extras.channel_shift
        keeps = hidden.device if settings.aims_at_teacher else None
        tokens = self.total * hidden.shape[1]
        with viewed(layer, spec, tokens, centered, keeps) as view, Ferry(self.probe.device) as ferry:
            for part in parts_of_samples(hidden):
                output = layer_output(layer, ferry.bring(hidden, part), self.kwargs)
                if self.teacher is not None:
                    ferry.give_back(hidden, part, output)
        return view

    def rows(self, layer: nn.Module, group: InputGroup, known: KnownOutputs | None = None) -> GroupRows:
        """What `layer`, as it is now, gives the linears of a group of the quantized network's samples."""
        return GroupRows(layer, group, self.student, self.kwargs, self.probe.device, self.allocate, known)
