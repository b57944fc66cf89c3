"""The sequences that context-parallel ranks share, as Megatron deals them out."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lasp.integrations.megatron.options import LaspOptions
from lasp.parallel import SequenceLayout, SequenceParallel

Made = dict[tuple[object, ...], SequenceParallel]

#: Those of one length, and those of packed documents by their boundaries.
_whole: Made = {}
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def sequence_of(
    group: dist.ProcessGroup, tokens: int, packed: PackedSeqParams | None, options: LaspOptions
) -> SequenceParallel:
    """The ranks and the layout of a micro-batch: made once, for all layers.

    Whole sequences are dealt out in zigzag, packed ones document by document, as Megatron does. What pads a document belongs
    to it.

    Args:
        group: the context-parallel ranks.
        tokens: how many this rank has of each sequence.
        packed: the documents, where the sequence is packed. Their boundaries are read from the device once a micro-batch.
        options: the method and the exchanges.

    Raises:
        ValueError: where the documents hold another number of tokens than the ranks.
    """
    size = group.size()
    key = (group.group_name, tokens, options.sp, options.exchange, options.softmax_sp)
    if packed is None:
        if key not in _whole:
            _whole[key] = _sequence(SequenceLayout.zigzag(tokens * size, size), group, options)
        return _whole[key]
    bounds: Tensor = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    made: Made = _packed.setdefault(bounds, {})
    if key not in made:
        # Boundaries may be padded with empty documents to a length of their own.
        documents = sorted(set(bounds.tolist()))
        if documents[-1] != tokens * size:
            raise ValueError(
                f"packed_seq_params: cu_seqlens end at {documents[-1]} tokens, but the {size} context-parallel ranks hold "
                f"{tokens} each"
            )
        made[key] = _sequence(SequenceLayout.zigzag_per_document(documents[-1], size, documents), group, options)
    return made[key]


def _sequence(layout: SequenceLayout, group: dist.ProcessGroup, options: LaspOptions) -> SequenceParallel:
    if group.size() == 1:
        return SequenceParallel.single(layout)
    return SequenceParallel(group, layout, method=options.sp, exchange=options.exchange, softmax=options.softmax_sp)
