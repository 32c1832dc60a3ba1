"""Feed-forwards; importing a file here registers its feed-forward."""

from triptych.models.feedforwards.channel_mix import ChannelMix
from triptych.models.feedforwards.gelu import GELU
from triptych.models.feedforwards.moe import MoE
from triptych.models.feedforwards.product_keys import ProductKeys
from triptych.models.feedforwards.swiglu import SwiGLU

__all__ = ["GELU", "ChannelMix", "MoE", "ProductKeys", "SwiGLU"]
