"""``tone_reader``: matched filters at the known frequencies read the digit off a waveform; nothing of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor

from mtdiffusion_audio.tones import FRAME, read
from mtdiffusion_registry import Evaluator, EvaluatorConfig, UserError, hookimpl

MTDIFFUSION_API = 1


class ToneReader(Evaluator):
    metric_directions = MappingProxyType({"tone_accuracy": "higher", "tone_agreement": "higher"})

    def __init__(self, config: ToneReaderConfig) -> None:
        self.input, self.target, self.rate = config.input, config.target, config.rate

    def _agreement(self, audio: Tensor, label: Tensor) -> float:
        return (read(audio, self.rate) == label.cpu()).double().mean().item()

    def conditional(
        self, target: str, generated: Mapping[str, Tensor], truth: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """``tone_accuracy``: how often the generated waveform is heard as the true digit."""
        if target != self.input:
            return {}
        return {"tone_accuracy": self._agreement(generated[self.input], truth[self.target])}

    def joint(self, generated: Mapping[str, Tensor]) -> dict[str, float]:
        """``tone_agreement``: how often it is heard as the digit that was generated with it."""
        if self.input not in generated or self.target not in generated:
            return {}
        return {"tone_agreement": self._agreement(generated[self.input], generated[self.target])}

    def real(self, test: Mapping[str, Tensor]) -> dict[str, float]:
        """``tone_accuracy`` on held-out data: how good the reader itself is."""
        return {"tone_accuracy": self._agreement(test[self.input], test[self.target])}


@frozen
class ToneReaderConfig(EvaluatorConfig):
    """Reads the digit ``target`` off the waveform ``input``.

    Attributes:
        input: the modality it listens to.
        target: the modality it reads off it, a label of ten digits.
        rate: samples a second of the waveform.
    """

    kind: ClassVar[str] = "tone_reader"
    input: str = "audio"
    target: str = "label"
    rate: int = field(default=8000, validator=ge(4000))

    def build(self, train: Mapping[str, Tensor]) -> Evaluator:
        for name in (self.input, self.target):
            if name not in train:
                raise UserError(f"evaluators.tone_reader: no modality named {name!r}; there are {', '.join(train)}")
        audio, label = train[self.input], train[self.target]
        if audio.ndim != 2 or audio.shape[1] < FRAME:
            raise UserError(
                f"evaluators.tone_reader: expected {self.input!r} to be waveforms of at least {FRAME} samples, found "
                f"shape {list(audio.shape[1:])}"
            )
        if label.ndim != 1 or label.is_floating_point():
            raise UserError(
                f"evaluators.tone_reader: expected {self.target!r} to be class indices, found {label.dtype} of shape "
                f"{list(label.shape[1:])}"
            )
        return ToneReader(self)


@hookimpl
def mtdiffusion_evaluators() -> list[type[EvaluatorConfig]]:
    return [ToneReaderConfig]
