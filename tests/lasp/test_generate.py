"""Decoding of the whole model: the parallel form's logits, in its memory; what is drawn of them, and the text as it comes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lasp.generate
import lasp.models.generation
from lasp.data import tokenizer_of
from lasp.layers import MIXERS, SoftmaxAttention
from lasp.models import MIXTURE, LinearLlama3, LinearLlama3Config, LinearLlama3State, generate
from lasp.models.generation import Sampling
from lasp.parallel.mesh import processes
from lasp.training import checkpoint
from tests.support import Inputs, poisoned_memory, relative_error

TOKENS, VOCABULARY = 17, 32
ROOT = Path(__file__).parent.parent.parent


def model(**options) -> LinearLlama3:
    """With weights so large that every layer matters."""
    torch.manual_seed(0)
    small = {"vocabulary": VOCABULARY, "hidden": 16, "heads": 4, "intermediate": 24, "layers": 4}
    made = LinearLlama3(LinearLlama3Config(**(small | options)))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() > 1 and "conv" not in name:
                weight *= 6
    return made


def tokens(batch: int = 2, count: int = TOKENS) -> Tensor:
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(1))


def stepped(net: LinearLlama3, given: Tensor, *pieces: int) -> tuple[Tensor, LinearLlama3State]:
    state, logits = net.initial_state(len(given)), []
    for piece in given.split(pieces, dim=1):
        y, state = net.step(piece, state)
        logits.append(y)
    return torch.cat(logits, dim=1), state


# -- the logits ----------------------------------------------------------------------------------------------------

PIECES = [(1,) * TOKENS, (5, 1, 7, 4), (TOKENS,)]
SOFTMAX = [{}, {"window": 4}, {"window": 1}, {"window": 4, "kv_heads": 2}, {"kv_heads": 1}]


@pytest.mark.parametrize("pattern", ["L", "LLLN"])
@pytest.mark.parametrize("mixer", [*MIXERS, MIXTURE])
def test_steps_give_the_logits_of_the_whole_sequence(mixer: str, pattern: str) -> None:
    net = model(mixer=mixer, pattern=pattern, layers=2 if pattern == "L" else 4, window=4, kv_heads=2)
    check_steps(net, 1e-4)


@pytest.mark.parametrize("options", SOFTMAX, ids=str)
def test_steps_of_softmax_layers_give_the_logits_of_the_whole_sequence(options: dict) -> None:
    check_steps(model(pattern="N", layers=2, **options), 1e-5)
    check_steps(model(pattern="NL", layers=2, **options), 1e-5)


@torch.no_grad()
def check_steps(net: LinearLlama3, tolerance: float) -> None:
    whole = net(tokens())
    for pieces in PIECES:
        with poisoned_memory():
            logits, _ = stepped(net, tokens(), *pieces)
        assert relative_error(logits, whole) < tolerance, pieces


@pytest.mark.parametrize("options", [{"pattern": "LN"}, *({"pattern": "N", **more} for more in SOFTMAX)], ids=str)
@torch.no_grad()
def test_prompts_of_different_lengths_go_on_side_by_side(options: dict) -> None:
    net, prompts = model(layers=2, mixer="retention", **options), [tokens(2, 7), tokens(1, 3).flip(1), tokens(1, 7)]
    states = [stepped(net, prompt, 1, prompt.shape[1] - 1)[1] for prompt in prompts]
    more = tokens(4, 9).flip(0)
    state, found = LinearLlama3State.joined(states), []
    for piece in more.split((1, 3, 1, 4), dim=1):
        y, state = net.step(piece, state)
        found.append(y)
    logits, alone = torch.cat(found, dim=1), [row[None] for prompt in prompts for row in prompt]
    for row, prompt in enumerate(alone):
        whole = net(torch.cat([prompt, more[row : row + 1]], dim=1))
        assert relative_error(logits[row : row + 1], whole[:, prompt.shape[1] :]) < 1e-5
    # And these side by side with others, of as many tokens as the longest or fewer.
    for count in (16, 2):
        y, _ = net.step(tokens(5, 1), LinearLlama3State.joined([stepped(net, tokens(1, count), count)[1], state]))
        for row, prompt in enumerate(alone):
            whole = net(torch.cat([prompt, more[row : row + 1], tokens(5, 1)[1 + row : 2 + row]], dim=1))
            assert relative_error(y[1 + row, -1], whole[0, -1]) < 1e-5


# -- the memory ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_memory_grows_with_the_keys_and_values_of_softmax_layers_alone() -> None:
    given = tokens(2, 160)

    def sizes(net: LinearLlama3) -> list[int]:
        state, found = net.initial_state(2), [net.initial_state(2).nbytes]
        for piece in given.split((3, *(1,) * 77, 80), dim=1):
            _, state = net.step(piece, state)
            held = [layer.room.places if "N" in net.config.pattern else layer.memory for layer in state.layers]
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in held)
            found.append(state.nbytes)
        return found

    for mixer in (*MIXERS, MIXTURE):
        assert len(set(sizes(model(mixer=mixer, pattern="L", layers=1)))) == 1

    # Keys and values of a token, two sequences and four layers in float32, and of each layer a position a sequence.
    token, positions = 2 * 2 * 8 * 4 * 4, 2 * 8 * 4
    windowed = sizes(model(pattern="N", window=4, kv_heads=2))
    assert set(windowed[4:]) == {2 * 3 * token + positions}
    whole = sizes(model(pattern="N", kv_heads=2))
    for count, size in enumerate(whole[1:], start=3):
        length = min(count, 80) if count < 81 else 160
        assert length * token <= size - positions <= 2 * length * token
    assert len(set(whole)) < 10  # a token is not copied for each that follows


@torch.no_grad()
def test_a_state_can_be_continued_more_than_once() -> None:
    net = model(pattern="N", layers=2)
    _, state = stepped(net, tokens(), *(1,) * TOKENS)
    one, other = tokens(), tokens().flip(1)
    states = [net.step(given[:, :1], state)[1] for given in (one, other)]
    for given, after in zip((one, other), states, strict=True):
        y, _ = net.step(given[:, 1:], after)
        whole = net(torch.cat([tokens(), given], dim=1))
        assert relative_error(y, whole[:, TOKENS + 1 :]) < 1e-5


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_pass_through_the_cache(window: int | None) -> None:
    layer, found = SoftmaxAttention(16, 4, kv_heads=2, window=window).double(), []
    for pieces in ((TOKENS,), (2, 1, 1, 7, 5, 1)):
        x, state, total = Inputs(3, torch.float64).normal(2, TOKENS, 16).requires_grad_(), layer.initial_state(2), 0
        for piece in x.split(pieces, dim=1):
            y, state = layer.step(piece, state)
            total = total + y.square().sum()
        # What follows without gradients leaves those before alone.
        with torch.no_grad():
            layer.step(piece[:, :1], state)
        found.append(torch.autograd.grad(total, x)[0])
    x = Inputs(3, torch.float64).normal(2, TOKENS, 16).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert max(relative_error(each, dx) for each in found) < 1e-10


@torch.no_grad()
def test_mixed_precision() -> None:
    """Under autocast keys and values are kept in what attention computes in."""
    net = model(pattern="LN", layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = stepped(net, tokens(), *(1,) * TOKENS)
        whole = net(tokens())
    assert state.layers[1].room.places.dtype == torch.bfloat16
    assert relative_error(logits, whole) < 5e-2
    y, state = net.step(tokens()[:, :1], state)  # and goes on without
    assert (y.dtype, state.layers[1].room.places.dtype) == (torch.float32, torch.float32)


# -- what is drawn -------------------------------------------------------------------------------------------------


def drawn(net: LinearLlama3, count: int = 12, **options) -> Tensor:
    return torch.stack([*generate(net, tokens(3, 5), count, **options)], dim=1)


@pytest.mark.parametrize("pattern", ["L", "LN", "N"])
def test_without_temperature_each_token_is_the_likeliest(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, given = model(pattern=pattern, layers=2, window=6), tokens(3, 5)
    for _ in range(12):
        given = torch.cat([given, net(given)[:, -1:].argmax(-1)], dim=1)
    assert len(given[:, 5:].unique()) > 3
    assert torch.equal(drawn(net, temperature=0), given[:, 5:])
    assert torch.equal(drawn(net, top_k=1), given[:, 5:])
    assert torch.equal(drawn(net, top_p=1e-9), given[:, 5:])
    assert torch.equal(drawn(net, temperature=1e-99), given[:, 5:])
    monkeypatch.setattr(lasp.models.generation, "PIECE", 2)
    assert torch.equal(drawn(net, temperature=0), given[:, 5:])


def test_no_more_logits_are_made_than_are_drawn_from() -> None:
    net, made = model(layers=1), []
    net.head.register_forward_hook(lambda _module, _inputs, logits: made.append(logits.numel() // VOCABULARY))
    assert len([*generate(net, tokens(3, 5), 4)]) == 4
    assert made == [3] * 4


def test_a_seed_draws_the_same_again() -> None:
    net = model(layers=2)
    found = drawn(net, seed=3)
    assert found.dtype == torch.int64
    assert not found.requires_grad
    assert torch.equal(drawn(net, seed=3), found)
    assert torch.equal(drawn(net, generator=torch.Generator().manual_seed(3)), found)
    assert not torch.equal(drawn(net, seed=4), found)
    torch.manual_seed(9)
    first = drawn(net)
    torch.manual_seed(9)
    assert torch.equal(drawn(net), first)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    likely = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1])

    def shares(count: int = 40_000, **options) -> list[float]:
        found = Sampling(**options).draw(likely.log().expand(count, 5), torch.Generator().manual_seed(0))
        return (found.bincount(minlength=5) / count).tolist()

    def want(*weights: float):
        return pytest.approx([weight / sum(weights) for weight in weights], abs=0.01)

    assert shares() == want(0.15, 0.4, 0.05, 0.3, 0.1)
    assert shares(temperature=0.5) == want(0.15**2, 0.4**2, 0.05**2, 0.3**2, 0.1**2)
    assert shares(top_k=2) == want(0, 0.4, 0, 0.3, 0)
    assert shares(top_k=99) == want(0.15, 0.4, 0.05, 0.3, 0.1)
    assert shares(top_p=0.69) == want(0, 0.4, 0, 0.3, 0)
    assert shares(top_p=0.71) == want(0.15, 0.4, 0, 0.3, 0)
    assert shares(top_p=1.0) == want(0.15, 0.4, 0.05, 0.3, 0.1)
    assert shares(top_k=3, top_p=0.8) == want(0, 0.4, 0, 0.3, 0)  # of the three, 0.82 is two's
    assert shares(count=1, temperature=0) == [0, 1, 0, 0, 0]
    assert Sampling(top_k=1).draw(torch.zeros(2, 5000)).tolist() == [0, 0]
    assert Sampling(temperature=1e-99).draw(torch.tensor([[50.0, 90.0, 80.0]])).tolist() == [1]


def test_rows_end_with_their_stop_tokens() -> None:
    net = model(layers=2)
    free = drawn(net, 20, seed=0)
    stop = [int(free[0, 2]), int(free[1, 6]), int(free[2, 4])]
    ended = drawn(net, 20, seed=0, stop=stop)
    at = [next(i for i, token in enumerate(row.tolist()) if token in stop) for row in free]
    assert ended.shape[1] == 1 + max(at) < 20
    for row, last in enumerate(at):
        assert torch.equal(ended[row, : last + 1], free[row, : last + 1])
        assert set(ended[row, last:].tolist()) == {int(free[row, last])}


def test_the_state_is_that_of_the_tokens_read() -> None:
    run = generate(model(layers=2), tokens(3, 5), 4)
    positions = [run.state.layers[0].position.tolist() for _ in run]
    assert positions == [[5] * 3, [6] * 3, [7] * 3, [8] * 3]
    assert [*run] == []


# -- the text ------------------------------------------------------------------------------------------------------

TEXT = "Größe 😀😀 und 漢字, ﬀ — naïve\n"


def asked(given: list[int]) -> Iterator[int]:
    """Each only once the one before was looked at."""
    yield from given


def test_bytes_stream_by_whole_characters() -> None:
    tokenizer = tokenizer_of("bytes")
    pieces = [*tokenizer.stream(asked([*TEXT.encode()]))]
    assert [piece for piece in pieces if piece] == [*TEXT]
    assert pieces[0] == "G"
    for garbage in (b"\xff\xfe\xf0\x9f\x98", b"a\xc3", b"\xf0\x9f\x98\xc3\xa9\x80b", b"\xff" * 9):
        assert "".join(tokenizer.stream([*garbage])) == garbage.decode(errors="replace")
    assert "".join(tokenizer.stream([65, 300, 66])) == "A\ufffdB"


def test_tokens_stream_by_whole_characters(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["und und und Größe"] * 9,
        tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False),
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of(str(tmp_path))
    (ids,) = tokenizer.encode([TEXT.encode()])
    assert len(ids) > len(TEXT)
    for cut in (0, 1, 9):
        pieces = [*tokenizer.stream(asked(ids[cut:].tolist()), ids[:cut].tolist())]
        assert "".join(pieces) == TEXT[len(tokenizer.decode(ids[:cut].tolist())) :]
        assert "😀" in pieces
        assert "\ufffd" not in "".join(pieces)
    smile = tokenizer.encode(["😀".encode()])[0].tolist()
    assert len(smile) == 4
    # What is no text does not hold up what follows, and is told at the end.
    for garbage in (smile[:1] * 9 + smile, smile[3:] * 2 + smile, smile[:3]):
        stream = tokenizer.stream(asked(garbage))
        assert "".join(stream) == tokenizer.decode(garbage)
    stream = tokenizer.stream(asked(smile[3:] * 9))
    assert [next(stream) for _ in range(5)] == ["\ufffd"] * 5


def test_a_space_after_the_prompt_is_not_lost(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer, words.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of(str(tmp_path))
    assert tokenizer.decode([1]) == "two"
    assert [*tokenizer.stream([1, 0], before=[0])] == [" two", " one"]
    assert [*tokenizer.stream([1, 0])] == ["two", " one"]


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that learnt nothing."""
    net = model(vocabulary=256, layers=2, pattern="LN")
    with processes("cpu"):
        told = {"model": net.config.plain(), "tokenizer": "bytes"}
        checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
        checkpoints.save(0, {"model": dict(net.named_parameters())}, told, lambda _: None)
        checkpoints.wait()
    return tmp_path


def test_the_command_streams_text(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--checkpoint", str(run), "--prompt", "né", "--max-tokens", "40", "--device", "cpu"]
    monkeypatch.setattr(lasp.generate, "generate", lambda *_, **__: Answer(TEXT))
    lasp.generate.main(given)
    told = capsys.readouterr()
    assert told.out == "né" + TEXT + "\n"
    assert "3 tokens read" in told.err
    assert f"{len(TEXT.encode()) - 1} more at" in told.err
    assert "a state of 1.00 MiB" in told.err
    monkeypatch.undo()
    options = ["--seed", "5", "--temperature", "0.8", "--top-k", "40", "--top-p", "0.9"]
    texts = []
    for _ in range(2):
        lasp.generate.main([*given, *options])
        texts.append(capsys.readouterr().out)
    net, _ = checkpoint.read_model(run)
    alone = generate(net, torch.tensor([[*"né".encode()]]), 40, seed=5, temperature=0.8, top_k=40, top_p=0.9)
    assert texts[0] == texts[1] == "né" + bytes(int(token) for token in alone).decode(errors="replace") + "\n"


class Answer:
    """In place of a generation: the bytes of a text, and a state of a mebibyte."""

    class state:
        nbytes = 2**20

    def __init__(self, text: str):
        self.tokens = [torch.tensor([byte]) for byte in text.encode()]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tokens)


def test_the_command_by_itself(run: Path) -> None:
    command = [sys.executable, "-m", "lasp.generate", "--checkpoint", run, "--prompt", "def ", "--max-tokens", "3"]
    told = subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    assert told.stdout.startswith(b"def ")
    assert told.stderr.startswith(b"4 tokens read and the first written in ")
    assert told.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt: empty, expected the text that is to go on"),
        (["--device", "tpu"], "--device tpu: unknown, expected one of auto, cpu, cuda"),
        (["--checkpoint", "/nowhere"], "--checkpoint /nowhere: no checkpoint there"),
        (["--tokenizer", "words"], "--tokenizer words: expected bytes, a tokenizer.json or its directory"),
        (["--max-tokens", "0"], "max_tokens=0: expected at least 1"),
        (["--temperature", "-1"], "temperature=-1.0: expected at least 0"),
        (["--top-k", "0"], "top_k=0: expected at least 1"),
        (["--top-p", "1.5"], "top_p=1.5: expected above 0 and at most 1"),
    ],
)
def test_bad_options_of_the_command(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--checkpoint": str(run), "--prompt": "a", "--device": "cpu"} | {arguments[0]: arguments[1]}
    with pytest.raises(SystemExit) as end:
        lasp.generate.main([part for pair in given.items() for part in pair])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"lasp.generate: error: {message}")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"at least one token, given torch.int64 \[1, 0\]"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, r"prompt must be int64 \[B, T\] .* given torch.int64 \[3\]"),
        ({"prompt": torch.zeros(1, 3)}, r"prompt must be int64 \[B, T\] .* given torch.float32 \[1, 3\]"),
        ({"prompt": torch.tensor([[1, 32]])}, "tokens from 1 to 32, the model those from 0 to 31"),
        ({"prompt": torch.tensor([[-1, 3]])}, "tokens from -1 to 3, the model those from 0 to 31"),
        ({"max_tokens": 0}, "max_tokens=0: expected at least 1"),
        ({"temperature": float("nan")}, "temperature=nan: expected at least 0"),
        ({"top_p": 0.0}, "top_p=0.0: expected above 0"),
        ({"seed": 1, "generator": torch.Generator()}, "seed= was given beside generator="),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    """At once, not when the first token is asked for."""
    with pytest.raises(ValueError, match=message):
        generate(model(layers=1), **({"prompt": tokens(), "max_tokens": 3} | options))


def test_a_state_of_another_batch() -> None:
    for pattern in "LN":
        net = model(layers=1, pattern=pattern)
        with pytest.raises(ValueError, match="step: x holds 2 sequences and the state 3"):
            net.step(tokens(2), net.initial_state(3))
