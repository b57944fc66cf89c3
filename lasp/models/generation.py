"""Generation: a prompt is read piece by piece, then each token is drawn from the logits of the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.models.linear_llama3 import LinearLlama3, LinearLlama3State
from lasp.ops.norm import at_least_float32

#: How many tokens of a prompt are read at once: what bounds the memory of reading it.
PIECE = 2048


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn of logits.

    Attributes:
        temperature: what the logits are divided by; 0 for the likeliest token.
        top_k: how many tokens, the likeliest, are drawn from; all when None.
        top_p: of these, the fewest of that probability together, the likeliest; all when None. Nucleus sampling,
            https://arxiv.org/abs/1904.09751, section 3.1.

    Raises:
        ValueError: where one is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: expected at least 0, which is the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token of each row, int64 ``[B]``, of logits ``[B, vocabulary]``. Of equally likely tokens the first count."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits, tokens = at_least_float32(logits).sort(dim=-1, descending=True, stable=True)
        logits = logits[:, : self.top_k]
        # The largest is 0, so that no temperature is too low.
        least = torch.finfo(logits.dtype).tiny
        likely = ((logits - logits[:, :1]) / max(self.temperature, least)).softmax(-1)
        if self.top_p is not None:
            before = likely.cumsum(-1) - likely
            likely = likely.masked_fill(before >= self.top_p, 0)
        return tokens.gather(-1, torch.multinomial(likely, 1, generator=generator)).squeeze(-1)


@dataclass
class Generation(Iterator[Tensor]):
    """Tokens that follow on a prompt, int64 ``[B]`` each, computed as they are asked for. `generate` makes it.

    Attributes:
        model: what gives their logits.
        sampling: how they are drawn.
        generator: what they are drawn by; torch's own when None.
        stop: tokens after which a row has ended: from then on it gives the last one again.
        left: how many more there are at most.
        logits: those of the next token ``[B, vocabulary]``.
        state: the model's, after all tokens whose successors' logits were asked for.
        drawn: the last token, None before the first.
        ended: which rows have ended ``[B]``.
    """

    model: LinearLlama3
    sampling: Sampling
    generator: torch.Generator | None
    stop: Tensor
    left: int
    logits: Tensor
    state: LinearLlama3State
    ended: Tensor
    drawn: Tensor | None = None

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self.left == 0 or (len(self.stop) and bool(self.ended.all())):
            raise StopIteration
        if self.drawn is None:
            drawn = self.sampling.draw(self.logits, self.generator)
        else:
            logits, self.state = self.model.step(self.drawn.unsqueeze(-1), self.state)
            self.logits = logits[:, -1]
            drawn = torch.where(self.ended, self.drawn, self.sampling.draw(self.logits, self.generator))
        self.ended = self.ended | torch.isin(drawn, self.stop)
        self.drawn, self.left = drawn, self.left - 1
        return drawn


@torch.no_grad()
def generate(
    model: LinearLlama3,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    stop: Sequence[int] = (),
) -> Generation:
    """Read a prompt and iterate over the tokens that follow on it. Records no gradients.

    Args:
        model: on one device.
        prompt: ``[B, T]``, of T ≥ 1 tokens.
        max_tokens: how many tokens a row is given at most.
        temperature: see `Sampling`.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        seed: what the tokens are drawn by: the same ones on the same device.
        generator: likewise, on the model's device; torch's own when both are None.
        stop: tokens after which a row has ended: it gives that token until all rows have, which ends the iteration.

    Returns:
        An iterator over int64 ``[B]`` on the model's device, which has the model's `state` too.

    Raises:
        ValueError: where an argument is out of its range, or the prompt is empty or not of the model's vocabulary.
    """
    sampling, device = Sampling(temperature, top_k, top_p), model.embedding.weight.device
    if prompt.dim() != 2 or prompt.dtype != torch.int64 or 0 in prompt.shape:
        raise ValueError(
            f"generate: prompt must be int64 [B, T] of at least one token, given {prompt.dtype} {list(prompt.shape)}"
        )
    vocabulary = model.config.vocabulary
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(
            f"generate: the prompt has tokens from {prompt.min()} to {prompt.max()}, the model those from 0 to "
            f"{vocabulary - 1}; use the tokenizer that it was trained with"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: expected at least 1")
    if seed is not None:
        if generator is not None:
            raise ValueError("generate: seed= was given beside generator=, which has its own")
        generator = torch.Generator(device).manual_seed(seed)
    state = model.initial_state(len(prompt))
    for piece in prompt.to(device).split(PIECE, dim=1):
        x, state = model.step_features(piece, state)
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=device)
    stops = torch.tensor(tuple(stop), dtype=torch.int64, device=device)
    return Generation(model, sampling, generator, stops, max_tokens, model.head(x[:, -1]), state, ended)
