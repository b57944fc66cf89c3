"""What the plug-in may be told, beyond what Megatron's own configuration says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megatron.core.transformer import TransformerConfig

from lasp.layers import FEATURE_MAPS, MIXERS, mixer_type
from lasp.models import MIXTURE
from lasp.parallel.exchange import EXCHANGES
from lasp.parallel.sequence_parallel import METHODS, SOFTMAX

#: Mixers that need no projection but those of queries, keys and values: they stand under Megatron's own attention.
CORES = ("basic", "lightning", "retention")


@dataclass(frozen=True)
class LaspOptions:
    """The mixer of the linear layers, and how sequences are shared.

    Heads, widths and norms are those of Megatron's configuration. A mixer of `CORES` has no output gate here.

    Attributes:
        mixer: a name in `lasp.layers.MIXERS`, or "mom".
        mom_recurrence: what each memory of a mixture is, a name in `lasp.layers.MIXERS`.
        num_memories: how many memories a mixture has, without the shared one.
        top_k: how many of them a token chooses.
        shared_memory: whether there is one more, for all tokens.
        balance: weight of the loss by which a mixture's tokens choose its memories evenly.
        z_loss: weight of the loss that keeps the logits of a mixture's routers small.
        feature_map: of queries and keys, a name in `lasp.layers.FEATURE_MAPS`; the mixer's own when None.
        conv_size: width of the short convolution; 0 for none, the mixer's own when None.
        key_heads: heads of the linear layers' queries and keys; the mixer's own when None.
        key_width: of a head's queries and keys in the linear layers; the mixer's own when None.
        value_width: of a head's values in the linear layers; the mixer's own when None.
        rope_theta: base of the rotation, for mixers that rotate.
        sp: the method, as `lasp.SequenceParallel` takes it; "none" where no sequence is shared.
        exchange: how states travel, likewise.
        softmax_sp: how the softmax layers' keys and values travel, likewise.

    Raises:
        ValueError: naming the option that is unknown or out of range.
    """

    mixer: str = "gated_delta_net"
    mom_recurrence: str = "gated_delta_net"
    num_memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    balance: float = 0.01
    z_loss: float = 0.0
    feature_map: str | None = None
    conv_size: int | None = None
    key_heads: int | None = None
    key_width: int | None = None
    value_width: int | None = None
    rope_theta: float = 10000.0
    sp: str = "lasp2"
    exchange: str = "auto"
    softmax_sp: str = "auto"

    def __post_init__(self) -> None:
        known = {
            "mixer": (*MIXERS, MIXTURE),
            "mom_recurrence": tuple(MIXERS),
            "feature_map": (None, *FEATURE_MAPS),
            "sp": ("none", *METHODS),
            "exchange": ("auto", *EXCHANGES),
            "softmax_sp": ("auto", *SOFTMAX),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                expected = ", ".join(value for value in values if value is not None)
                raise ValueError(f"{flag(name)} {getattr(self, name)}: unknown, expected one of {expected}")
        if self.num_memories < 1 or not 1 <= self.top_k <= self.num_memories:
            raise ValueError(
                f"--top-k {self.top_k}, --num-memories {self.num_memories}: expected 1 <= top-k <= num-memories"
            )
        for name in ("balance", "z_loss"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: must be at least 0")
        if self.mixer == MIXTURE and self.sp in METHODS and METHODS[self.sp].linear != "states":
            raise ValueError(f"--sp {self.sp}: a mixture's memories are states that travel, and with it none do")

    @property
    def recurrence(self) -> str:
        """The mixer that a layer's states are of."""
        return self.mom_recurrence if self.mixer == MIXTURE else self.mixer

    def check(self, config: TransformerConfig, linear: bool) -> None:
        """Raise where Megatron's configuration does not go with it.

        Args:
            config: Megatron's.
            linear: whether there are linear layers.

        Raises:
            ValueError: naming Megatron's option, or this one, that has to change.
        """
        tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
        heads, key_heads = config.num_attention_heads, self.key_heads or mixer_type(self.recurrence).default_key_heads
        if context > 1 and self.sp == "none":
            raise ValueError(
                f"--sp none, --context-parallel-size {context}: each rank would take its part of a sequence for all of it; "
                f"choose one of {', '.join(METHODS)}"
            )
        if config.attention_dropout:
            raise ValueError(f"--attention-dropout {config.attention_dropout}: this attention has none, set it to 0")
        if config.experimental_attention_variant is not None:
            raise ValueError(
                f"experimental_attention_variant={config.experimental_attention_variant!r}: leave it unset, the layers are "
                "given here"
            )
        if linear and (heads % tensor or (key_heads is not None and key_heads > 1 and key_heads % tensor)):
            raise ValueError(
                f"--tensor-model-parallel-size {tensor} does not divide the linear layers' heads: "
                f"--num-attention-heads {heads}" + ("" if key_heads is None else f", key_heads={key_heads}")
            )
        if linear and tensor > 1 and self.recurrence == "mamba2" and (key_heads or 1) % tensor:
            raise ValueError(
                f"mixer mamba2: its norm is of all heads of a group, and --tensor-model-parallel-size {tensor} parts them; "
                f"use as many groups (key_heads), given {key_heads or 1}"
            )

    def mixer_options(self) -> dict[str, Any]:
        """Those that a mixer takes."""
        names = ("feature_map", "conv_size", "key_heads", "key_width", "value_width", "rope_theta")
        return {name: getattr(self, name) for name in names}


def flag(name: str) -> str:
    """How an option is written on the command line."""
    assert name in {field.name for field in fields(LaspOptions)}
    return "--" + name.replace("_", "-")
