"""Models on disk as Hugging Face has them: ``config.json`` and ``model.safetensors``, or shards of it with an index.

Needs the package safetensors, and no transformers.
"""

from __future__ import annotations

import json
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
from lasp.models.huggingface import CONFIG, described, published_name, read_config, read_fields, read_json
from lasp.models.inherited import inherited
from lasp.models.linear_llama3 import LinearLlama3

WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
#: The dtypes that weights may have in a file.
FLOATS = ("F64", "F32", "F16", "BF16")


class Loaded(NamedTuple):
    """A model whose weights are those of a directory, as far as it has them.

    Attributes:
        model: on the CPU.
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
        _write_weights(weights, unfinished, max_shard_bytes)
        _write_json(unfinished / CONFIG, about)


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
        The model, of float32 whatever the weights are on disk, as it is trained; float64 where one of them is.

    Raises:
        ValueError: where a file is missing or broken, weights are missing, unknown or of other shapes than the configuration's,
            or the configuration asks for what `LinearLlama3` is not.
    """
    directory = Path(directory)
    was, config = read_config(directory), read_config(directory, **changes)
    with torch.device("meta"):
        other = LinearLlama3(was)
    files = _files(directory)
    dtypes = _check(directory, files, other)
    model = LinearLlama3(config)
    if "F64" in dtypes:
        model.double()
    parameters, origins = dict(model.named_parameters()), inherited(model, other)
    wanted: dict[str, list[str]] = {}
    for name, origin in origins.items():
        wanted.setdefault(published_name(origin.name, was.kinds), []).append(name)
    with torch.no_grad():
        for file in sorted(set(files.values())):
            with _opened(file) as weights:
                for theirs in [name for name in wanted if files[name] == file]:
                    given = weights.get_tensor(theirs)
                    for name in wanted[theirs]:
                        origins[name].fill(parameters[name], given)
    return Loaded(model, tuple(origins), tuple(name for name in parameters if name not in origins))


def pretrained_tokenizer(directory: Path) -> str:
    """The tokenizer of a model's directory, as ``--tokenizer`` takes it."""
    if (directory / TOKENIZER).is_file():
        return str(directory / TOKENIZER)
    return str(read_fields(directory).get("tokenizer", BYTES))


# -- reading ----------------------------------------------------------------------------------------------------------


def _files(directory: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (directory / WEIGHTS).is_file():
        with _opened(directory / WEIGHTS) as weights:
            return dict.fromkeys(weights.keys(), directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        raise ValueError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")
    shards = read_json(directory / INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{directory / INDEX}: weight_map is missing")
    return {name: directory / str(shard) for name, shard in shards.items()}


def _check(directory: Path, files: Mapping[str, Path], model: LinearLlama3) -> set[str]:
    """Raise unless the tensors are those of the model. Returns the dtypes that they have."""
    config = model.config
    shapes = {published_name(name, config.kinds): list(p.shape) for name, p in model.named_parameters()}
    # The head of a tied model may stand there again, and old files have the rotary positions' frequencies.
    unread = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in files:
        unread.add("lm_head.weight")
        if not torch.equal(*(_tensor(files, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))):
            raise ValueError(
                f"{directory}: tie_word_embeddings=True, but lm_head.weight is not model.embed_tokens.weight"
            )
    found: dict[str, tuple[list[int], str]] = {}
    for file in sorted(set(files.values())):
        with _opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 – a file is no mapping
                if files.get(name) == file and name not in unread:
                    tensor = weights.get_slice(name)
                    found[name] = tensor.get_shape(), tensor.get_dtype()
    for what, names in ("missing", shapes.keys() - found.keys()), ("unknown", found.keys() - shapes.keys()):
        if names:
            few = ", ".join(islice(sorted(names), 3)) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
            raise ValueError(f"{directory}: the weights are not those of {CONFIG}: {few} {what}")
    for name, (shape, dtype) in found.items():
        if shape != shapes[name]:
            raise ValueError(f"{directory}: {name} must be {shapes[name]} by {CONFIG}, given {shape}")
        if dtype not in FLOATS:
            raise ValueError(f"{directory}: {name} is of dtype {dtype}, expected one of {', '.join(FLOATS)}")
    return {dtype for _, dtype in found.values()}


def _tensor(files: Mapping[str, Path], name: str) -> Tensor:
    with _opened(files[name]) as weights:
        return weights.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A file of weights, of which only what is asked for is read."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(file, framework="pt") as weights:
            yield weights
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not whole, or no safetensors: {error}") from None


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("weights in Hugging Face's format need the package safetensors, install it") from None
    return safetensors


# -- writing ----------------------------------------------------------------------------------------------------------


def _write_weights(weights: Mapping[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    """As one file, or as shards in the order of the weights and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, weight in weights.items():
        if shards[-1] and weight.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = weight
        room -= weight.nbytes
    stem, ending = WEIGHTS.split(".")
    of = {name: f"{stem}-{i:05}-of-{len(shards):05}.{ending}" for i, shard in enumerate(shards, 1) for name in shard}
    for shard in shards:
        file = directory / (of[next(iter(shard))] if len(shards) > 1 else WEIGHTS)
        whole = {name: weight.cpu().contiguous() for name, weight in shard.items()}
        _safetensors().torch.save_file(whole, file, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(weight.nbytes for weight in weights.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": of})


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
