"""Operators: a reference beside every fast form, one dispatcher, counter-based random numbers."""

from triptych.kernels.attention import attention
from triptych.kernels.causal_conv1d import causal_conv1d
from triptych.kernels.dispatch import Form, register, table
from triptych.kernels.dropout import dropout
from triptych.kernels.gelu import gelu
from triptych.kernels.grouped_linear import grouped_linear
from triptych.kernels.grouped_mlp import grouped_mlp
from triptych.kernels.haar import haar, inverse_haar
from triptych.kernels.layer_norm import layer_norm, modulated_layer_norm
from triptych.kernels.linear_cross_entropy import VocabShards, linear_cross_entropy
from triptych.kernels.mlstm import mlstm, mlstm_step
from triptych.kernels.moe_rows import moe_combine, moe_gather, moe_plan
from triptych.kernels.product_keys import product_key_topk, rank_one_experts
from triptych.kernels.random import hash_bits, hash_normal, hash_uniform, string_key
from triptych.kernels.rms_norm import rms_norm
from triptych.kernels.rotary import rotary
from triptych.kernels.selective_scan import selective_scan, selective_scan_step
from triptych.kernels.ssd import ssd, ssd_step
from triptych.kernels.swiglu import swiglu
from triptych.kernels.wkv import wkv

__all__ = [
    "Form",
    "VocabShards",
    "attention",
    "causal_conv1d",
    "dropout",
    "gelu",
    "grouped_linear",
    "grouped_mlp",
    "haar",
    "hash_bits",
    "hash_normal",
    "hash_uniform",
    "inverse_haar",
    "layer_norm",
    "linear_cross_entropy",
    "mlstm",
    "mlstm_step",
    "modulated_layer_norm",
    "moe_combine",
    "moe_gather",
    "moe_plan",
    "product_key_topk",
    "rank_one_experts",
    "register",
    "rms_norm",
    "rotary",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "string_key",
    "swiglu",
    "table",
    "wkv",
]
