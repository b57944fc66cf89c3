"""Models on disk as Hugging Face has them: ``config.json`` and ``model.safetensors``, or shards of it with an index.

Needs the package safetensors, and no transformers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.data import BYTES
from lasp.models.huggingface import CONFIG, check_sizes, described, published_name, read_config, read_fields
from lasp.models.inherited import inherited
from lasp.models.linear_llama3 import LinearLlama3
from lasp.models.weights import INDEX, WEIGHTS, Stored, opened, stored, write_json, write_weights

#: The file of a tokenizer.
TOKENIZER = "tokenizer.json"
#: The dtypes that weights may have in a file.
FLOATS = ("F64", "F32", "F16", "BF16")


class Loaded(NamedTuple):
    """A model whose weights are those of a directory, as far as it has them.

    Attributes:
        model: the model.
        imported: its parameters that are the directory's, by name.
        initialised: those that start anew.
    """

    model: LinearLlama3
    imported: tuple[str, ...]
    initialised: tuple[str, ...]


def save_pretrained(
    model: LinearLlama3,
    directory: Path | str,
    *,
    tokenizer: str = BYTES,
    max_positions: int = 8192,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model so that `load_pretrained` reads it; where all its layers are softmax attention, transformers too.

    It is written beside the directory, which it then replaces. Who is interrupted leaves what was there whole: in its place,
    or, between the two moves, as ``<directory>.replaced``.

    Args:
        model: on any device. Weights keep their dtypes.
        directory: new, or of a model that was written before.
        tokenizer: "bytes", or the path of a ``tokenizer.json`` or of its directory, which is copied.
        max_positions: ``max_position_embeddings``, what other programs are told of the longest sequence.
        max_shard_bytes: how large a file of weights may get; a tensor is never divided.

    Raises:
        ValueError: where the directory holds other things, or there is no such tokenizer.
    """
    from_file = None if tokenizer == BYTES else _tokenizer_file(Path(tokenizer))
    weights = {published_name(name, model.config.kinds): p.detach() for name, p in model.named_parameters()}
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    about = described(model.config) | {
        "max_position_embeddings": max_positions,
        "dtype": dtype,
        "torch_dtype": dtype,
        "tokenizer": BYTES if from_file is None else TOKENIZER,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with _whole_or_not(Path(directory)) as unfinished:
        if from_file is not None:
            shutil.copyfile(from_file, unfinished / TOKENIZER)
        write_weights(weights, unfinished, max_shard_bytes)
        write_json(unfinished / CONFIG, about)


def load_pretrained(directory: Path | str, **changes: Any) -> Loaded:
    """Read a model that `save_pretrained` wrote, a Llama or a Mistral, as it is or with other mixers in its layers.

    ``load_pretrained(directory, pattern="LLLN", mixer="gla")`` makes a hybrid of a Llama: layers that stay softmax attention,
    MLPs, norms, embedding and head are imported, and of linear mixers the projections of queries, keys, values and output
    where their heads agree (see `lasp.models.inherited.inherited`). All else starts anew, as in a new `LinearLlama3`, by
    torch's seed.

    Args:
        directory: of ``config.json`` and ``model.safetensors``, or its shards and their index.
        changes: fields of `LinearLlama3Config` that shall be others than the directory's.

    Returns:
        The model, on the CPU, of float32 whatever the weights are on disk, as it is trained; float64 where one of them is.

    Raises:
        ValueError: where a file is missing or broken, weights are missing, unknown or of other shapes than the configuration's,
            or the configuration asks for what `LinearLlama3` is not.
    """
    directory = Path(directory)
    config = read_config(directory, **changes)
    wide = any(tensor.dtype == "F64" for tensor in stored(directory).values())
    model = LinearLlama3(config)
    if wide:
        model.double()
    return import_pretrained(model, directory)


def import_pretrained(model: LinearLlama3, directory: Path | str) -> Loaded:
    """Give a model the weights in a directory, as far as it has them: see `load_pretrained`.

    Args:
        model: of the same sizes, on any device and of any dtype, which it keeps.
        directory: of ``config.json`` and ``model.safetensors``, or its shards and their index.

    Returns:
        The same model.

    Raises:
        ValueError: as `load_pretrained`.
    """
    directory = Path(directory)
    config = read_config(directory)
    check_sizes(model.config, config, directory)
    with torch.device("meta"):
        other = LinearLlama3(config)
    tensors = stored(directory)
    _check(directory, tensors, other)
    parameters, origins = dict(model.named_parameters()), inherited(model, other)
    wanted: dict[str, list[str]] = {}
    for name, origin in origins.items():
        wanted.setdefault(published_name(origin.name, config.kinds), []).append(name)
    with torch.no_grad():
        for file in sorted({tensor.file for tensor in tensors.values()}):
            with opened(file) as weights:
                for theirs in [name for name in wanted if tensors[name].file == file]:
                    given = weights.get_tensor(theirs)
                    for name in wanted[theirs]:
                        origins[name].fill(parameters[name], given)
    imported, initialised = ([name for name in parameters if (name in origins) is whether] for whether in (True, False))
    return Loaded(model, tuple(imported), tuple(initialised))


def pretrained_tokenizer(directory: Path) -> str:
    """The tokenizer of a model's directory, as ``--tokenizer`` takes it."""
    if (directory / TOKENIZER).is_file():
        return str(directory / TOKENIZER)
    return str(read_fields(directory).get("tokenizer", BYTES))


def _check(directory: Path, tensors: Mapping[str, Stored], model: LinearLlama3) -> None:
    """Raise unless the tensors are those of the model."""
    config = model.config
    shapes = {published_name(name, config.kinds): list(p.shape) for name, p in model.named_parameters()}
    # The head of a tied model may stand there again, and old files have the rotary positions' frequencies.
    given = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in given:
        given.remove("lm_head.weight")
        if not torch.equal(*(_tensor(tensors, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))):
            raise ValueError(
                f"{directory}: tie_word_embeddings=True, but lm_head.weight is not model.embed_tokens.weight"
            )
    for what, names in ("missing", shapes.keys() - given), ("unknown", given - shapes.keys()):
        if names:
            few = ", ".join(islice(sorted(names), 3)) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
            raise ValueError(f"{directory}: the weights are not those of {CONFIG}: {few} {what}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{directory}: {name} must be {shape} by {CONFIG}, given {tensors[name].shape}")
        if tensors[name].dtype not in FLOATS:
            raise ValueError(
                f"{directory}: {name} is of dtype {tensors[name].dtype}, expected one of {', '.join(FLOATS)}"
            )


def _tensor(tensors: Mapping[str, Stored], name: str) -> Tensor:
    with opened(tensors[name].file) as weights:
        return weights.get_tensor(name)


def _tokenizer_file(path: Path) -> Path:
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer={path}: expected {BYTES}, a {TOKENIZER} or its directory; there is none")
    return file


@contextmanager
def _whole_or_not(directory: Path) -> Iterator[Path]:
    """A directory to write into, which takes the place of `directory` when all is written."""
    directory = directory.resolve()
    if directory.exists():
        if not directory.is_dir():
            raise ValueError(f"{directory}: expected a directory, there is a file")
        shards = {file.name for file in directory.glob("model-*-of-*.safetensors")}
        others = {file.name for file in directory.iterdir()} - {CONFIG, WEIGHTS, INDEX, TOKENIZER, *shards}
        if others:
            raise ValueError(f"{directory}: holds {min(others)}, which is no model's: give a directory of its own")
    unfinished, replaced = (directory.with_name(f"{directory.name}.{what}") for what in ("unfinished", "replaced"))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(directory, replaced)
    os.replace(unfinished, directory)
    shutil.rmtree(replaced, ignore_errors=True)
