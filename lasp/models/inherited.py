"""What a model can take over of another of the same sizes whose layers mix tokens by other means.

A softmax layer's projections are where a linear layer well begins, and so are those of another linear mixer (linearisation:
https://arxiv.org/abs/2405.06640, https://arxiv.org/abs/2408.15237); decays, gates and convolutions have no counterpart.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lasp.layers.mixer import LinearMixer
from lasp.layers.mom import MixtureOfMemories
from lasp.layers.softmax import SoftmaxAttention
from lasp.models.linear_llama3 import LinearLlama3


class Origin(NamedTuple):
    """What a parameter begins as.

    Attributes:
        name: the other model's parameter.
        heads: how many heads its rows are of, where they are repeated.
        repeats: how many heads that follow one another begin as each of them.
    """

    name: str
    heads: int = 1
    repeats: int = 1

    def fill(self, parameter: Tensor, given: Tensor) -> None:
        """Copy the other's weight ``[...]`` into the parameter, into each of its memories where it has several ``[M, ...]``."""
        if self.repeats > 1:
            given = given.unflatten(0, (self.heads, -1)).repeat_interleave(self.repeats, 0).flatten(0, 1)
        parameter.copy_(given)


def inherited(model: LinearLlama3, other: LinearLlama3) -> dict[str, Origin]:
    """What the parameters of a model begin as, by name; those that start anew are left out.

    A mixer of the same kind gives all that has the same shape, to each memory of a mixture where it is its recurrence. One
    of another kind gives its projections of queries, keys, values and output, where both have heads of the same width: of
    keys and values that heads share, each head takes a copy, as grouped queries read them.

    Args:
        model: the one.
        other: the other, of the same sizes; may be on the device "meta".
    """
    found = {name: Origin(name) for name, _ in model.named_parameters() if ".mixer." not in name}
    for layer in range(model.config.layers):
        at = f"blocks.{layer}.mixer"
        taken = _of_mixer(model.get_submodule(at), other.get_submodule(at))
        found |= {f"{at}.{name}": origin._replace(name=f"{at}.{origin.name}") for name, origin in taken.items()}
    return found


def _of_mixer(mixer: nn.Module, other: nn.Module) -> dict[str, Origin]:
    """Of a layer's mixer, by the names that they have in it."""
    (at, inside), (its_at, its) = _recurrence(mixer), _recurrence(other)
    if type(inside) is not type(its):
        found = _projected(inside, its)
    elif at == its_at:
        return _alike(mixer, other)
    else:
        found = _alike(inside, its)
    return {at + name: origin._replace(name=its_at + origin.name) for name, origin in found.items()}


def _recurrence(mixer: nn.Module) -> tuple[str, nn.Module]:
    """What each memory of a mixture is, or the mixer itself, and what its parameters' names begin with."""
    return ("mixer.", mixer.mixer) if isinstance(mixer, MixtureOfMemories) else ("", mixer)


def _alike(mixer: nn.Module, other: nn.Module) -> dict[str, Origin]:
    """All that has the same shape, or the shape of one memory's."""
    theirs = {name: parameter.shape for name, parameter in other.named_parameters()}
    return {
        name: Origin(name)
        for name, parameter in mixer.named_parameters()
        if theirs.get(name) in (parameter.shape, parameter.shape[1:])
    }


def _projected(mixer: nn.Module, other: nn.Module) -> dict[str, Origin]:
    """The projections whose heads agree."""
    found, theirs = {}, _heads(other)
    for name, (heads, width) in _heads(mixer).items():
        shared, its_width = theirs.get(name, (0, 0))
        if width != its_width or heads % shared or (heads > shared and name not in ("k_proj.weight", "v_proj.weight")):
            continue
        weight, its = mixer.get_parameter(name), other.get_parameter(name)
        # What is each memory's own begins as another memory's, or as what is no memory's own.
        if its.shape == weight.shape or its.dim() == 2:
            found[name] = Origin(name, shared, heads // shared)
    return found


def _heads(mixer: nn.Module) -> dict[str, tuple[int, int]]:
    """How many heads there are of the projections that mean the same in every mixer that has them, and how wide one is."""
    if isinstance(mixer, SoftmaxAttention):
        heads, shared = (proj.out_features // mixer.width for proj in (mixer.q_proj, mixer.k_proj))
        numbers = {"q": heads, "k": shared, "v": shared, "o": heads}
        return {f"{name}_proj.weight": (number, mixer.width) for name, number in numbers.items()}
    assert isinstance(mixer, LinearMixer)
    keys, values = (mixer.key_heads, mixer.key_width), (mixer.heads, mixer.value_width)
    every = {"q_proj": keys, "k_proj": keys, "v_proj": values, "o_proj": values}
    return {f"{name}.weight": every[name] for name in mixer.inheritable}
