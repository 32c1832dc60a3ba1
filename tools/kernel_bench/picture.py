"""Ratios to peers as bars on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triptych.training.pictures import Pictures

_LINE, _MARGIN, _AXIS, _GAP = 18, 12, 420, 6
_BLACK, _GREY, _PAPER = (20, 20, 20), (150, 150, 145), (250, 250, 246)
_FASTER, _SLOWER = (38, 70, 150), (170, 60, 40)


def ratio_picture(bars: Mapping[str, Mapping[str, float]]) -> Pictures:
    """A bar per peer of each problem, from 1 to how many times as fast ours is; uint8 (H, W, 3).

    bars: problem -> peer -> ratio, > 0. Blue where ours is faster, red where the peer is.
    """
    lines = [(problem if n == 0 else "", peer, ratio)
             for problem, peers in bars.items() for n, (peer, ratio) in enumerate(peers.items())]  # fmt: skip
    ratios = [ratio for _, _, ratio in lines] or [1.0]
    low = math.floor(min(0.0, min(map(math.log10, ratios))))
    high = max(low + 1, math.ceil(max(map(math.log10, ratios))))
    names = _MARGIN + _widest(problem for problem, _, _ in lines)
    left = names + _widest(peer for _, peer, _ in lines)
    groups = sum(problem != "" for problem, _, _ in lines)
    height = 2 * _MARGIN + _LINE * (len(lines) + 2) + _GAP * groups
    image = Image.new("RGB", (left + _AXIS + 70, height), _PAPER)
    draw = ImageDraw.Draw(image)

    def place(ratio: float) -> float:
        return left + _AXIS * (math.log10(ratio) - low) / (high - low)

    for power in range(low, high + 1):
        at = place(10.0**power)
        draw.line((at, _MARGIN + _LINE, at, height - _MARGIN), fill=_BLACK if power == 0 else _GREY)
        draw.text((at, _MARGIN), f"{10.0**power:g}x", fill=_BLACK, anchor="ma")
    top = _MARGIN + _LINE
    for problem, peer, ratio in lines:
        top += _GAP * (problem != "")
        draw.text((_MARGIN, top + 3), problem, fill=_BLACK)
        draw.text((names, top + 3), peer, fill=_BLACK)
        ends = sorted((place(1.0), place(ratio)))
        draw.rectangle((ends[0], top + 3, ends[1], top + _LINE - 4), fill=_FASTER if ratio >= 1 else _SLOWER)
        draw.text((ends[1] + 4, top + 3), f"{ratio:.3g}x", fill=_BLACK)
        top += _LINE
    draw.text((left, top + 4), "times as fast as the peer, forward and backward", fill=_BLACK)
    return np.asarray(image)


def _widest(texts: Iterable[str]) -> int:
    font = ImageFont.load_default()
    return _MARGIN + max((math.ceil(font.getlength(text)) for text in texts), default=0)
