"""The shape of a model: one frozen dataclass, and the sizes that have names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lasp.layers.features import feature_map
from lasp.layers.linear import mixer_type
from lasp.layers.mixer import head_width
from lasp.layers.rotary import RopeScaling

#: What a letter of a layer pattern stands for.
PATTERN = {"L": "the linear mixer", "N": "softmax attention"}

#: The mixer that is none of its own: several memories, each of which is another.
MIXTURE = "mom"


@dataclass(frozen=True)
class LinearLlama3Config:
    """Linear-Llama3 (LASP-2, https://arxiv.org/abs/2502.07563, section 4): Llama 3 with linear mixers for most layers.

    Attributes:
        vocabulary: how many tokens there are.
        hidden: width of the model.
        layers: how many layers.
        heads: heads of every mixer; they divide `hidden`.
        kv_heads: heads of the softmax layers' keys and values; they divide `heads`, which they are when None.
        intermediate: width of the MLP.
        pattern: a letter a layer, repeated over the depth: L is the linear mixer, N softmax attention ("normal").
        mixer: the linear mixer, a name in `lasp.layers.MIXERS`, or "mom" for a mixture of memories.
        mom_recurrence: what each memory of it is, a name in `lasp.layers.MIXERS`.
        num_memories: how many memories it has, without the shared one.
        top_k: how many of them a token chooses.
        shared_memory: whether it has one more, for all tokens.
        feature_map: of the linear mixer, a name in `lasp.layers.FEATURE_MAPS`; the mixer's own when None.
        conv_size: width of the linear mixer's short convolution; 0 for none, the mixer's own when None.
        gated: whether the linear mixer's output is gated; as the mixer is when None.
        window: how many tokens a softmax layer's token sees; all when None.
        rope_theta: base of the rotary positions.
        rope_scaling: of their frequencies, as Llama 3.1 has it; none when None.
        norm_eps: of all norms.
        tied: whether the output head is the embedding.

    Raises:
        ValueError: where sizes do not divide or a name is unknown.
    """

    vocabulary: int = 256
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    intermediate: int = 384
    pattern: str = "LLLN"
    mixer: str = "gla"
    mom_recurrence: str = "gated_delta_net"
    num_memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    feature_map: str | None = None
    conv_size: int | None = None
    gated: bool | None = None
    window: int | None = None
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "hidden", "layers", "heads", "intermediate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, given {getattr(self, name)}")
        if head_width(self.hidden, self.heads) % 2:
            raise ValueError(
                f"heads={self.heads} leave hidden={self.hidden} an odd head width: rotary positions need an even one"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if not self.pattern or set(self.pattern) - PATTERN.keys():
            known = ", ".join(f"{letter} ({meaning})" for letter, meaning in PATTERN.items())
            raise ValueError(f"pattern={self.pattern!r} must be made of the letters {known}")
        if (self.conv_size is not None and self.conv_size < 0) or (self.window is not None and self.window < 1):
            raise ValueError(
                f"conv_size must be at least 0 and window at least 1, given {self.conv_size}, {self.window}"
            )
        mixer_type(self.mom_recurrence if self.mixer == MIXTURE else self.mixer)
        if not 1 <= self.top_k <= self.num_memories:
            raise ValueError(f"top_k={self.top_k} must be from 1 to num_memories={self.num_memories}")
        if self.feature_map is not None:
            feature_map(self.feature_map)

    def plain(self) -> dict[str, Any]:
        """All of it in plain types, as JSON holds it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> LinearLlama3Config:
        """The inverse of `plain`."""
        scaling = plain.get("rope_scaling")
        return cls(**{**plain, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})

    @property
    def kinds(self) -> str:
        """The letter of each layer: the pattern, repeated to the depth."""
        return (self.pattern * self.layers)[: self.layers]


#: The sizes that have names, as ``--preset`` takes them.
PRESETS = {
    # Bytes, about a million parameters: what two CPU cores train in a couple of minutes.
    "tiny": LinearLlama3Config(),
    # The same with a mixture of memories, Gated DeltaNets, in three layers of four.
    "tiny-mom": LinearLlama3Config(mixer=MIXTURE),
    # Bytes, about 40 million parameters.
    "small": LinearLlama3Config(hidden=512, layers=12, heads=8, intermediate=1408),
    # The paper's, with Llama 3's vocabulary: 1.1 billion parameters, of which 263 million embed. Tied, as Llama 3.2 1B is.
    "linear-llama3-1b": LinearLlama3Config(
        vocabulary=128256, hidden=2048, layers=16, heads=16, intermediate=5504, tied=True
    ),
}


def preset(name: str) -> LinearLlama3Config:
    """The configuration of that name.

    Raises:
        ValueError: where there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset={name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
