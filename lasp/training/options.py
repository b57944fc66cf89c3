"""What a run may be told. The command line is made of these fields: `sp_size` is ``--sp-size``, the docstring its help."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from lasp.data import BYTES, Part, Windows, tokenizer_of, tokens_of
from lasp.models import PRESETS, LinearLlama3Config
from lasp.models.huggingface import read_config
from lasp.training.checks import check
from lasp.training.recall import Recall


@dataclass(frozen=True)
class Options:
    """Pretrain Linear-Llama3, pure or hybrid, with its sequences shared among ranks.

    torchrun --nproc-per-node 4 pretrain.py --sp lasp2
    """

    preset: str = "tiny"
    """Size of the model: tiny (1M parameters, for CPUs), tiny-mom (with a mixture of memories), small (40M), linear-llama3-1b
    (the paper's)."""
    init_from: Path | None = None
    """Start from the weights in a directory as Hugging Face has them, of a Llama or of what lasp.export wrote, instead of a
    preset: the model is theirs but for the pattern, the mixer and what else is given, and what they do not have starts anew."""
    mixer: str | None = None
    """Token mixer of the linear layers: basic, lightning, retention, simple_gla, gla, hgrn2, delta_net, gated_delta_net, kda,
    mamba2; or mom, a mixture of memories. The preset's if not given."""
    mom_recurrence: str | None = None
    """What each memory of a mixture is: any of the other mixers. The preset's if not given."""
    num_memories: int | None = None
    """How many memories a mixture has, without the shared one. The preset's if not given."""
    top_k: int | None = None
    """How many of them a token writes to and reads. The preset's if not given."""
    shared_memory: bool | None = None
    """Whether a mixture has one more memory, for all tokens. The preset's if not given."""
    balance: float = 0.01
    """Weight of the loss by which a mixture's tokens choose its memories evenly."""
    router_z_loss: float = 0.0
    """Weight of the loss that keeps the logits of a mixture's routers small."""
    pattern: str | None = None
    """A letter a layer, repeated over the depth: L linear, N softmax ("normal"), as in LLLN. The preset's if not given."""
    feature_map: str | None = None
    """Of the linear mixer's queries and keys: identity, elu, relu, silu, softmax, taylor. The mixer's own if not given."""
    vocabulary: int | None = None
    """How many tokens there are; text needs those of its tokenizer. The preset's if not given."""
    layers: int | None = None
    """How many layers. The preset's if not given."""
    hidden: int | None = None
    """Width of the model. The preset's if not given."""
    heads: int | None = None
    """Heads of every token mixer; they divide the width. The preset's if not given."""
    kv_heads: int | None = None
    """Heads of the softmax layers' keys and values; they divide the heads. The preset's if not given."""
    intermediate: int | None = None
    """Width of the MLP. The preset's if not given."""
    conv_size: int | None = None
    """Width of the linear mixer's short convolution; 0 for none. The preset's, or else the mixer's, if not given."""
    gated: bool | None = None
    """Whether the linear mixer's output is gated. As the mixer is if not given."""
    window: int | None = None
    """How many tokens a token of a softmax layer sees. All before it if not given."""

    sp: str = "lasp2"
    """Method of sequence parallelism: lasp2, lasp1 (rings), zeco (pipelined states), ulysses (heads are dealt out), ring (keys
    and values travel for linear layers too), or none for data parallelism alone."""
    sp_size: int | None = None
    """How many consecutive ranks share a sequence; the other ranks take other sequences. All ranks if not given."""
    layout: str = "contiguous"
    """Who holds which tokens of a sequence: contiguous, zigzag (balances causal softmax), zigzag-per-document."""
    exchange: str = "auto"
    """How the linear layers' states travel between ranks: auto (the method's own), all-gather, ring, pipelined (ring in
    blocks), scan (by doubling), two-level (inside nodes, then between them)."""
    explain: bool = False
    """Tell after the first step why auto chose the exchange that it did."""
    softmax_sp: str = "auto"
    """How the softmax layers' keys and values travel: auto (the method's own), all-gather, ring or ulysses."""
    fsdp: bool = False
    """Whether all ranks share weights, gradients and the optimizer's state, a layer's weights being gathered where it is
    computed (FSDP2). If not, each rank holds all of them."""
    micro_batch_size: int | None = None
    """Sequences that a rank's model takes at once; the gradients of several add up to the step's. All of its own if not
    given."""
    recompute: str = "none"
    """What the backward computes again instead of keeping it: none, selective (the MLPs: nothing travels twice), full (whole
    layers)."""

    task: str = "text"
    """What to train on: text, or mqar (multi-query associative recall: sequences that ask again for what they told)."""
    pairs: tuple[int, ...] = (16,)
    """Of mqar, how many keys with their values a sequence has to remember; of several numbers, each step draws one."""
    data: tuple[Path, ...] = ()
    """Files of text, of JSON lines (.jsonl, their "text") or of parquet (.parquet, likewise), by themselves, gzip (.gz) or zstd
    (.zst), or directories of them. The sources of Python's standard library if not given."""
    data_weights: tuple[float, ...] = ()
    """How much is read of each of several, in proportion; as much as each has if not given."""
    tokenizer: str = BYTES
    """How text becomes tokens: bytes, or the path of a Hugging Face tokenizer.json."""
    data_cache: Path = Path("runs/tokens")
    """Directory of the tokens, which are made once of text."""
    document_mask: bool = True
    """Whether documents are told apart: states, attention and convolutions begin anew with each."""
    validation: float = 0.01
    """Share of each text's tokens, the last, that is not trained on; none where it is less than a sequence."""
    eval_interval: Annotated[int | None, tyro.conf.arg(aliases=("--eval-every",))] = None
    """Steps between two measurements of the loss on the tokens that are not trained on; at the end only if not given."""
    eval_steps: int = 8
    """Batches of each."""
    seq_len: int = 1024
    """Tokens of a sequence."""
    batch_size: int = 4
    """Sequences a step, over all ranks; the data-parallel ranks divide it."""

    steps: int = 300
    """How many steps to train, those before a resumed checkpoint included."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: int = 20
    """Steps over which the learning rate rises to its peak."""
    schedule: str = "cosine"
    """How it goes on: cosine (falls from there to the last step), wsd (stays, and falls over the last steps alone)."""
    decay: float = 0.2
    """Of wsd, the share of the steps over which it falls."""
    min_lr: float = 0.1
    """How much of the peak is left after the last step."""
    weight_decay: float = 0.1
    """Of AdamW, on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient, over all weights; a larger one is scaled down to it."""
    z_loss: float = 0.0
    """Weight of the loss that keeps the logits' normaliser near 1 (log² of it; PaLM takes 1e-4)."""
    dtype: str = "float32"
    """What the matrix products are computed in: float32 or bfloat16. Weights, norms and gates are float32 in both."""
    device: str = "auto"
    """Where to train: cpu, cuda, or auto for cuda where there is one."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    deterministic: bool = False
    """Whether two runs on the same GPUs are the same to the last bit, which costs some time; on CPUs they are in any case."""

    out: Path = Path("runs/pretrain")
    """Directory for metrics.jsonl, the plot, the summary and the checkpoints."""
    resume: str | None = None
    """Continue from a checkpoint, on as many ranks as there are: its directory, that of its run, or auto for the last one in
    --out where there is one."""
    log_interval: int = 10
    """Steps between two readings of the loss from the device. metrics.jsonl has every step in any case."""
    checkpoint_interval: int = 1000
    """Steps between two checkpoints; the last step writes one in any case."""
    keep_checkpoints: int = 2
    """How many of them stay, the last ones."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, in the folder tensorboard of --out."""
    wandb: str | None = None
    """Project of Weights & Biases to log the metrics to."""
    profile: str | None = None
    """Steps to trace by torch's profiler, the first and the last as in 20:24 or one; each rank's trace goes to --out."""
    peak_tflops: float | None = None
    """What one device computes at most, in 10^12 operations a second, for the utilisation (MFU); known of some GPUs."""

    def model(self) -> LinearLlama3Config:
        """The preset, or the model that is started from, with what was given in its place."""
        given = {
            field.name: getattr(self, field.name)
            for field in fields(LinearLlama3Config)
            if getattr(self, field.name, None) is not None
        }
        if self.init_from is not None:
            return read_config(self.init_from, **given)
        return replace(PRESETS[self.preset], **given)

    def ranks_of_a_sequence(self, world_size: int) -> int:
        """How many ranks share a sequence."""
        if self.sp == "none":
            return 1
        return world_size if self.sp_size is None else self.sp_size

    def source(self) -> Windows | Recall:
        """What to train on.

        Raises:
            ValueError: where the data is missing or too short, or a sequence for its pairs.
        """
        if self.task == "mqar":
            return Recall(self.model().vocabulary, self.pairs, self.seq_len, self.batch_size, self.seed)
        return self._windows(self._parts(trained=True), self.seed)

    def unseen(self) -> Windows | None:
        """What is not trained on, but measured, the same whatever the seed; None where there is none."""
        parts = [] if self.task == "mqar" else self._parts(trained=False)
        return self._windows(parts, seed=0) if any(parts) else None

    def _parts(self, trained: bool) -> list[Part | None]:
        """What of each text is trained on, or what is not: nothing, where it would be less than a sequence."""
        found: list[Part | None] = []
        for path in self.data or (None,):
            tokens = tokens_of(path, tokenizer_of(self.tokenizer), self.data_cache)
            kept = self.validation if len(tokens) * self.validation > self.seq_len + 1 else 0.0
            share = (0.0, 1.0 - kept) if trained else (1.0 - kept, 1.0)
            found.append(Part.of(tokens, self.seq_len, share) if trained or kept else None)
        return found

    def _windows(self, parts: list[Part | None], seed: int) -> Windows:
        """The parts that there are, by their weights."""
        there = [i for i, part in enumerate(parts) if part]
        weights = [self.data_weights[i] for i in there] if self.data_weights else None
        found = [part for part in parts if part]
        return Windows(found, self.seq_len, self.batch_size, seed, weights, self.document_mask)

    def device_type(self) -> str:
        """Where to train: ``"cpu"`` or ``"cuda"``."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def check(self, world_size: int) -> None:
        """Raise unless all of it can run on that many ranks. Needs neither other ranks nor a device.

        Raises:
            ValueError: naming the option that cannot.
        """
        check(self, world_size)

    def saved(self) -> dict[str, Any]:
        """The options in plain types, for a checkpoint."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value
