"""Small pictures and short texts inside a page."""

import base64
import io

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import image

MAX_SIDE = 96  # pixels


def cut(text: str, most: int) -> str:
    """A text in one line of at most that many letters; an ellipsis stands for the rest."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def data_uri(pixels: np.ndarray) -> str:
    """A PNG as a `data:` address, of uint8 pixels (height, width[, channels]); large ones are reduced."""
    buffer = io.BytesIO()
    image.imsave(buffer, _colored(_reduced(pixels)), format="png", metadata={"Software": ""})
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _reduced(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    ratio = MAX_SIDE / max(height, width)
    if ratio >= 1:
        return pixels
    size = max(1, round(height * ratio)), max(1, round(width * ratio))
    channels = torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1).float()
    reduced = F.interpolate(channels[None], size=size, mode="area")[0]
    return reduced.permute(1, 2, 0).round().byte().numpy().reshape(*size, *pixels.shape[2:])


def _colored(pixels: np.ndarray) -> np.ndarray:
    """With three or four channels; one channel is gray, and any other number shows its first."""
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        return pixels
    gray = pixels if pixels.ndim == 2 else pixels[..., 0]
    return np.repeat(gray[..., None], 3, axis=2)
