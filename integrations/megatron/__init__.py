"""Megatron-Core: linear, hybrid and mixture-of-memories attention whose sequences the context-parallel ranks share.

`lasp_layer_specs` gives the layers of a `GPTModel`; nothing of Megatron's own is changed. Tensor-parallel ranks take heads, the
context-parallel group is the group that shares sequences, in the zigzag order in which Megatron deals them out.
"""

from lasp.integrations.megatron.arguments import add_lasp_args, options_of
from lasp.integrations.megatron.convert import from_megatron, load_whole, to_megatron
from lasp.integrations.megatron.options import LaspOptions
from lasp.integrations.megatron.specs import lasp_layer_specs

__all__ = [
    "LaspOptions",
    "add_lasp_args",
    "from_megatron",
    "lasp_layer_specs",
    "load_whole",
    "options_of",
    "to_megatron",
]
