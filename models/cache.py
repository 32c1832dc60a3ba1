"""State of a generation: what the mixers must remember of the tokens already seen.

Shape legend: B batch, S tokens held, G key-value heads or groups, D head dim, C channels, K taps,
H heads, P channels per head, N state.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Cache:
    """Starts empty; LanguageModel.forward extends it by the tokens it is given.

    length: tokens seen. layers: index of the block -> tensors of its mixer, by name: attention's k and v
    (B, S, G, D), of the window only where there is one; Mamba-1's conv_x and state (B, C, N); Mamba-2's
    conv_x, conv_b, conv_c (B, C, K - 1) and state (B, H, P, N); mLSTM's conv_x, memory (B, H, D, D + 1) and
    memory_log (B, H).
    """

    length: int = 0
    layers: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one block; an empty dict at the first call."""
        return self.layers.setdefault(index, {})
