"""``spoken_digits``: what to ask of a model of digits that are seen, heard, described and named."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from mtdiffusion_registry import Query, TaskConfig, hookimpl

MTDIFFUSION_API = 1


@frozen
class SpokenDigitsConfig(TaskConfig):
    """Hearing (label from audio), speaking (audio from label), describing (tokens from image), drawing what is heard
    (image from audio) or described (image from tokens), and all four at once.
    """

    kind: ClassVar[str] = "spoken_digits"

    def instances(self) -> tuple[str, ...]:
        return ("image", "label", "audio", "tokens")

    def queries(self) -> tuple[Query, ...]:
        return (
            Query(observed=("audio",), targets=("label",)),
            Query(observed=("label",), targets=("audio",)),
            Query(observed=("image",), targets=("tokens",)),
            Query(observed=("audio",), targets=("image",)),
            Query(observed=("tokens",), targets=("image",)),
            Query(),
        )


@hookimpl
def mtdiffusion_tasks() -> list[type[TaskConfig]]:
    return [SpokenDigitsConfig]
