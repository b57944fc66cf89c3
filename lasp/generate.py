"""Text that follows on a prompt: ``python -m lasp.generate --checkpoint runs/pretrain --prompt "def main("``.

The prompt and what follows stream to the standard output, one line of figures at the end to the standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lasp.data import tokenizer_of
from lasp.models import Generation, generate
from lasp.training import errors_in_one_line
from lasp.training.checkpoint import read_model

#: Where to compute, as ``--device`` takes it.
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Request:
    """Write text that follows on a prompt.

    python -m lasp.generate --checkpoint runs/pretrain --prompt "def main("
    """

    checkpoint: Path
    """The model: a run's --out directory, or a checkpoint in it."""
    prompt: str
    """What the text follows on."""
    max_tokens: int = 256
    """How many tokens to write."""
    temperature: float = 1.0
    """What the logits are divided by: the lower, the likelier the text; 0 for the likeliest token each time."""
    top_k: int | None = None
    """How many tokens, the likeliest, are drawn from. All if not given."""
    top_p: float | None = None
    """Of these, the fewest of that probability together. All if not given."""
    seed: int | None = None
    """The same gives the same text again. Another each time if not given."""
    device: str = "auto"
    """Where to compute: cpu, cuda, or auto for cuda where there is one."""
    tokenizer: str | None = None
    """How text becomes tokens: bytes, or the path of a Hugging Face tokenizer.json. The model's if not given."""

    def device_type(self) -> str:
        """Where to compute: ``"cpu"`` or ``"cuda"``.

        Raises:
            ValueError: where there is no such device.
        """
        if self.device not in DEVICES:
            raise ValueError(f"--device {self.device}: unknown, expected one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no CUDA device")
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the model and the prompt, then write."""
    request = tyro.cli(Request, args=arguments)
    with errors_in_one_line("lasp.generate"):
        device = request.device_type()
        if not request.prompt:
            raise ValueError("--prompt: empty, expected the text that is to go on; a newline will do")
        try:
            model, name = read_model(request.checkpoint)
        except ValueError as error:
            raise ValueError(f"--checkpoint {error}") from None
        tokenizer = tokenizer_of(request.tokenizer or name)
        prompt = tokenizer.encode([request.prompt.encode()])[0].tolist()
        times = [time.perf_counter()]
        generation = generate(
            model.to(device), torch.tensor([prompt]), request.max_tokens,
            temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, seed=request.seed,
        )  # fmt: skip
    print(request.prompt, end="", flush=True)
    with suppress(KeyboardInterrupt):
        for text in tokenizer.stream(_timed(generation, times), prompt):
            print(text, end="", flush=True)
    print()
    print(_figures(len(prompt), times, generation.state.nbytes), file=sys.stderr)


def _timed(generation: Generation, times: list[float]) -> Iterator[int]:
    """Its tokens; when each was there is added to `times`."""
    for token in generation:
        number = int(token)
        times.append(time.perf_counter())
        yield number


def _figures(prompt: int, times: Sequence[float], memory: int) -> str:
    """How long it took: `times` are the beginning's and each token's, of which the first needs the prompt to be read."""
    begun, first, last = times[0], times[:2][-1], times[-1]
    more = max(0, len(times) - 2)
    rate = more / (last - first) if more else 0.0
    return (
        f"{prompt} tokens read and the first written in {first - begun:.2f} s, {more} more at {rate:.1f} tokens/s; "
        f"a state of {memory / 2**20:.2f} MiB"
    )


if __name__ == "__main__":
    main()
