"""Linear-Llama3: pre-norm blocks of a token mixer and a SwiGLU MLP, in a pattern of linear and softmax layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lasp.layers.cache import AttentionState
from lasp.layers.linear import mixer_type
from lasp.layers.mom import MixtureOfMemories, PerMemory
from lasp.layers.norm import RMSNorm
from lasp.layers.passage import MixerState
from lasp.layers.router import Routing
from lasp.layers.softmax import SoftmaxAttention
from lasp.models.config import MIXTURE, LinearLlama3Config
from lasp.ops.inputs import CuSeqlens
from lasp.parallel import SequenceParallel

#: What of a layer the backward may compute again: nothing, its MLP, or all of it.
RECOMPUTE = ("none", "selective", "full")


class SwiGLU(nn.Module):
    """``W_down (silu(W_gate x) · W_up x)``, https://arxiv.org/abs/2002.05202."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[..., hidden]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class LinearLlama3State:
    """All that the model keeps of the tokens before.

    Attributes:
        layers: what each layer's mixer keeps.
    """

    layers: tuple[MixerState | AttentionState, ...]

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        return sum(layer.nbytes for layer in self.layers)

    @staticmethod
    def joined(states: Sequence[LinearLlama3State]) -> LinearLlama3State:
        """The states of several batches as one batch: of prompts of different lengths, to be continued side by side."""
        layers: Any = zip(*(state.layers for state in states), strict=True)
        return LinearLlama3State(tuple(type(layer[0]).joined(layer) for layer in layers))


class Block(nn.Module):
    """One layer: ``x + mixer(norm(x))``, then ``x + mlp(norm(x))``.

    Attributes:
        recompute: what of it the backward computes again instead of keeping it, of `RECOMPUTE`.
    """

    def __init__(self, config: LinearLlama3Config, layer_idx: int, recompute: str = "none"):
        super().__init__()
        self.recompute = recompute
        self.mixer_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mixer: Any = _mixer(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp = SwiGLU(config.hidden, config.intermediate)

    def forward(self, x: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """x: ``[B, T, hidden]``."""
        return self._perhaps_again("full", self._layer, x, sp, cu_seqlens)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The tokens that follow on those that made the mixer's state, and its state after them: see `LinearMixer.step`."""
        y, state = self.mixer.step(self.mixer_norm(x), state)
        return self._fed(x + y), state

    def _layer(self, x: Tensor, sp: SequenceParallel | None, cu_seqlens: CuSeqlens) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), sp=sp, cu_seqlens=cu_seqlens)
        return self._perhaps_again("selective", self._fed, x)

    def _fed(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))

    def _perhaps_again(self, when: str, part: Callable[..., Tensor], *given: Any) -> Tensor:
        """A part of the layer; where that is what `recompute` says, only its input is kept for the backward."""
        if self.recompute != when or not torch.is_grad_enabled():
            return part(*given)
        # Nothing is drawn at random.
        return cast(Tensor, checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False))


def _mixer(config: LinearLlama3Config, layer_idx: int) -> nn.Module:
    if config.kinds[layer_idx] == "N":
        return SoftmaxAttention(
            config.hidden,
            config.heads,
            kv_heads=config.kv_heads,
            window=config.window,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
        )
    options: dict[str, Any] = {
        "layer_idx": layer_idx,
        "num_layers": config.layers,
        "feature_map": config.feature_map,
        "conv_size": config.conv_size,
        "gated": config.gated,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "norm_eps": config.norm_eps,
    }
    if config.mixer != MIXTURE:
        return mixer_type(config.mixer)(config.hidden, config.heads, **options)
    return MixtureOfMemories(
        config.hidden,
        config.heads,
        recurrence=config.mom_recurrence,
        num_memories=config.num_memories,
        top_k=config.top_k,
        shared_memory=config.shared_memory,
        **options,
    )


class LinearLlama3(nn.Module):
    """The model of LASP-2's experiments, https://arxiv.org/abs/2502.07563, section 4, pure or hybrid by its pattern.

    Initialised as GPT-2 is: weights normal with deviation 0.02, those that write to the residual stream (every mixer's
    ``o_proj``, every MLP's ``down_proj``) divided by ``√(2 · layers)``, biases 0, norms 1; short convolutions keep their own.

    Args:
        config: its shape.
        recompute: what of its layers the backward computes again instead of keeping it, of `RECOMPUTE`.
    """

    def __init__(self, config: LinearLlama3Config, recompute: str = "none"):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(Block(config, layer_idx, recompute) for layer_idx in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding | PerMemory):
                residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / ((2 * self.config.layers) ** 0.5 if residual else 1))
            if isinstance(module, nn.Linear | PerMemory) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, tokens: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """What the head reads: ``[B, T, hidden]`` from tokens ``[B, T]``, this rank's."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, sp=sp, cu_seqlens=cu_seqlens)
        return self.norm(x)

    @property
    def routings(self) -> list[Routing]:
        """What the mixtures of memories chose in the last forward; empty where there are none."""
        mixers = (block.mixer for block in self.blocks)
        return [m.routing for m in mixers if isinstance(m, MixtureOfMemories) and m.routing is not None]

    def forward(self, tokens: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """The logits of each token's successor.

        Args:
            tokens: ``[B, T]``, this rank's.
            sp: the ranks that share the sequence, and its documents.
            cu_seqlens: the boundaries of packed documents, where there is no `sp`.

        Returns:
            ``[B, T, vocabulary]``.
        """
        return self.head(self.features(tokens, sp, cu_seqlens))

    def initial_state(self, batch: int) -> LinearLlama3State:
        """The state before any token, for `step`.

        Args:
            batch: how many sequences are decoded at once.
        """
        blocks: Any = self.blocks
        return LinearLlama3State(tuple(block.mixer.initial_state(batch) for block in blocks))

    def step(self, tokens: Tensor, state: LinearLlama3State) -> tuple[Tensor, LinearLlama3State]:
        """The logits of the successors of tokens that follow on those that made the state: for decoding, on one device.

        Linear layers keep as much after a million tokens as after one, softmax layers all keys and values of their window.

        Args:
            tokens: ``[B, T]``, one or more at a time; T may differ from call to call.
            state: `initial_state`, or what the last call gave.

        Returns:
            The logits ``[B, T, vocabulary]``, what `forward` gives for these tokens of the whole sequence, and the state
            after them.

        Raises:
            ValueError: where the state is of another batch size.
        """
        x, state = self.step_features(tokens, state)
        return self.head(x), state

    def step_features(self, tokens: Tensor, state: LinearLlama3State) -> tuple[Tensor, LinearLlama3State]:
        """What the head reads, ``[B, T, hidden]``, where not all logits are asked for: otherwise like `step`."""
        blocks: Any = self.blocks
        x, after = self.embedding(tokens), []
        for block, before in zip(blocks, state.layers, strict=True):
            x, layer = block.step(x, before)
            after.append(layer)
        return self.norm(x), LinearLlama3State(tuple(after))
