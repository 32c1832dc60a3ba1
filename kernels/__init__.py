"""Operators: a reference beside every fast form, one dispatcher, counter-based random numbers."""

from triptych.kernels.attention import attention
from triptych.kernels.causal_conv1d import causal_conv1d
from triptych.kernels.dispatch import Form, check, examples, forms, operators, register, table
from triptych.kernels.dropout import dropout
from triptych.kernels.gated_delta_rule import gated_delta_rule
from triptych.kernels.gated_linear_attention import gated_linear_attention, retention
from triptych.kernels.gated_residual import gated_residual
from triptych.kernels.geglu import geglu
from triptych.kernels.gelu import gelu
from triptych.kernels.grouped_linear import grouped_linear
from triptych.kernels.grouped_mlp import grouped_mlp
from triptych.kernels.haar import haar, inverse_haar
from triptych.kernels.layer_norm import layer_norm, modulated_layer_norm
from triptych.kernels.library import autocast_dtype, statistics_dtype, without_autocast
from triptych.kernels.linear_cross_entropy import VocabShards, linear_cross_entropy
from triptych.kernels.linear_recurrence import linear_recurrence
from triptych.kernels.long_conv import long_conv
from triptych.kernels.mlstm import mlstm, mlstm_step
from triptych.kernels.moe_rows import moe_combine, moe_gather, moe_plan
from triptych.kernels.product_keys import product_key_topk, rank_one_experts
from triptych.kernels.random import hash_bits, hash_normal, hash_uniform, string_key
from triptych.kernels.rms_norm import gated_rms_norm, rms_norm
from triptych.kernels.rotary import axial_rotary, rotary
from triptych.kernels.saved import Saved, saved_for_backward
from triptych.kernels.scan_order import invert_orders, scan_gather, scan_scatter
from triptych.kernels.selective_scan import selective_scan, selective_scan_step
from triptych.kernels.ssd import ssd, ssd_step
from triptych.kernels.swiglu import swiglu
from triptych.kernels.wkv import wkv
from triptych.kernels.wkv6 import wkv6

__all__ = [
    "Form",
    "Saved",
    "VocabShards",
    "attention",
    "autocast_dtype",
    "axial_rotary",
    "causal_conv1d",
    "check",
    "dropout",
    "examples",
    "forms",
    "gated_delta_rule",
    "gated_linear_attention",
    "gated_residual",
    "gated_rms_norm",
    "geglu",
    "gelu",
    "grouped_linear",
    "grouped_mlp",
    "haar",
    "hash_bits",
    "hash_normal",
    "hash_uniform",
    "inverse_haar",
    "invert_orders",
    "layer_norm",
    "linear_cross_entropy",
    "linear_recurrence",
    "long_conv",
    "mlstm",
    "mlstm_step",
    "modulated_layer_norm",
    "moe_combine",
    "moe_gather",
    "moe_plan",
    "operators",
    "product_key_topk",
    "rank_one_experts",
    "register",
    "retention",
    "rms_norm",
    "rotary",
    "saved_for_backward",
    "scan_gather",
    "scan_scatter",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "statistics_dtype",
    "string_key",
    "swiglu",
    "table",
    "without_autocast",
    "wkv",
    "wkv6",
]
