"""Files of weights: ``model.safetensors``, or shards of it with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lasp.models.huggingface import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    file: Path
    shape: list[int]
    dtype: str


def stored(directory: Path) -> dict[str, Stored]:
    """The tensors of a directory, by name; those that an index names, where it is right.

    Raises:
        ValueError: where there are no weights, or a file is missing or broken.
    """
    whole, index = directory / WEIGHTS, directory / INDEX
    shards = None
    if not whole.is_file():
        if not index.is_file():
            raise ValueError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index}: weight_map is missing")
    found = {}
    for file in [whole] if shards is None else sorted({directory / str(shard) for shard in shards.values()}):
        with opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 – a file is no mapping
                if shards is None or directory / str(shards.get(name)) == file:
                    tensor = weights.get_slice(name)
                    found[name] = Stored(file, tensor.get_shape(), tensor.get_dtype())
    return found


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file of weights, of which only what is asked for is read.

    Raises:
        ValueError: where there is none, it is broken, or the package safetensors is missing.
    """
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


def write_weights(weights: Mapping[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    """As one file, or as shards in the order of the weights and their index.

    Raises:
        ValueError: where the package safetensors is missing.
    """
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
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": of})


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """The fields as a JSON file."""
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
