"""Sounds of samples, of whichever modality writes its data as such: players on a page, and waves for a log.

Modalities write files alone. They do so in a folder of the caller's, who sees to it that a killed process leaves none
(:func:`mtdiffusion_registry.partial.partial_of`).
"""

from __future__ import annotations

import base64
import html
import io
import mimetypes
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtdiffusion import Modality, MultimodalDiffusion
from mtdiffusion_engine.pictures import Block, Row

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
"""Of the files that a browser plays."""

_STYLE = """
body {font: 15px/1.4 system-ui, sans-serif; color: #181a20; background: #fff; margin: 24px}
h1 {font-size: 22px} h2 {font-size: 17px; border-top: 1px solid #dee0e6; padding-top: 12px}
table {border-collapse: collapse} th {text-align: left; font-weight: normal; padding-right: 14px; white-space: nowrap}
th small {display: block; color: #7a7e88} td {padding: 2px; text-align: center; vertical-align: top}
td img {image-rendering: pixelated} audio {display: block; width: 160px; height: 32px}
"""


def is_heard(modality: Modality, folder: Path) -> bool:
    """Whether the files that a modality writes, such as one into this folder, are sounds."""
    with torch.no_grad():
        return modality.write(modality.placeholder(1)[0], folder, "one").suffix in SUFFIXES


def wave_of(modality: Modality, x: Tensor, folder: Path) -> tuple[Tensor, int] | None:
    """One x as sound, ``[samples]`` in [−1, 1], all channels in one, and how many samples are a second; None unless the
    modality writes a .wav of 16 bits (into this folder)."""
    path = modality.write(x, folder, "one")
    if path.suffix != ".wav":
        return None
    with wave.open(str(path), "rb") as file:
        if file.getsampwidth() != 2:
            return None
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return torch.from_numpy(values.mean(1) / 32768).float(), file.getframerate()


def sound_of(modality: Modality, x: Tensor, folder: Path) -> tuple[str, bytes]:
    """One x of a modality that is heard (:func:`is_heard`): the media type and the bytes of the file that the modality
    writes of it (into this folder)."""
    path = modality.write(x, folder, "one")
    return mimetypes.guess_type(path.name)[0] or "audio/wav", path.read_bytes()


def page_with_players(title: str, blocks: Sequence[Block], model: MultimodalDiffusion, folder: Path) -> str | None:
    """A page (HTML, in one piece) of the blocks, a player below each picture of a sound; None if nothing is heard.

    Args:
        folder: where the sounds may be written on the way; nothing in it is needed afterwards.
    """
    heard = {name for name in model.names if is_heard(model.modality(name), folder)}
    if not heard:
        return None
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts.append(f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>")
    for block in blocks:
        parts.append(f"<h2>{html.escape(block.title)}</h2><table>")
        for row in block.rows:
            modality = model.modality(row.name) if row.name in heard else None
            parts.append(f"<tr><th>{html.escape(row.name)} <small>{html.escape(row.role)}</small></th>")
            parts += _cells(row, modality, folder)
            parts.append("</tr>")
        parts.append("</table>")
    return "\n".join(parts)


def _cells(row: Row, modality: Modality | None, folder: Path) -> Iterator[str]:
    """A row's cells; with the modality that it is of, those that are heard."""
    for place, picture in enumerate(row.tiles()):
        if picture is None:
            yield "<td></td>"
            continue
        player = ""
        if modality is not None and row.values is not None and row.visible is None:  # a part has no sound of its own
            kind, content = sound_of(modality, row.values[place], folder)
            player = f'<audio controls preload="none" src="{_in_place(content, kind)}"></audio>'
        yield f"<td>{_image(picture)}{player}</td>"


def _image(picture: Image.Image) -> str:
    drawn = io.BytesIO()
    picture.save(drawn, "PNG")
    source = _in_place(drawn.getvalue(), "image/png")
    return f'<img src="{source}" width="{picture.width}" height="{picture.height}" alt="">'


def _in_place(content: bytes, kind: str) -> str:
    """A file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
