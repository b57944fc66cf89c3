"""The plug-in's options on a Megatron command line."""

from __future__ import annotations

import re
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from lasp.integrations.megatron.options import LaspOptions, flag

#: What Megatron has an option for itself, by its name there.
MEGATRON_S = {"rope_theta": "rotary_base"}


def add_lasp_args(parser: ArgumentParser) -> ArgumentParser:
    """The options of `LaspOptions`, and ``--pattern``: for ``pretrain(..., extra_args_provider=add_lasp_args)``.

    Args:
        parser: Megatron's.

    Returns:
        The parser.
    """
    group = parser.add_argument_group("lasp")
    group.add_argument(
        "--pattern", help="a letter a layer, repeated over the depth: L linear, N softmax, as in LLLN (the default)"
    )
    kinds, told = get_type_hints(LaspOptions), _told()
    for field in fields(LaspOptions):
        if field.name in MEGATRON_S:
            continue
        given: dict[str, Any] = {"default": field.default, "help": told[field.name].replace("%", "%%")}
        if kinds[field.name] is bool:
            given["action"] = BooleanOptionalAction
        else:
            given["type"] = next(iter(get_args(kinds[field.name])), kinds[field.name])
        group.add_argument(flag(field.name), **given)
    return parser


def options_of(args: Namespace) -> LaspOptions:
    """What was given.

    Raises:
        ValueError: naming the option that is unknown or out of range.
    """
    given = {}
    for field in fields(LaspOptions):
        value = getattr(args, MEGATRON_S.get(field.name, field.name), None)
        if value is not None:
            given[field.name] = value
    return LaspOptions(**given)


def _told() -> dict[str, str]:
    """What the options' docstring says of each."""
    attributes = (LaspOptions.__doc__ or "").partition("Attributes:")[2].partition("\n\n")[0]
    return {
        name: " ".join(text.split()) for name, text in re.findall(r"^ {8}(\w+): ((?:.|\n {12})*)", attributes, re.M)
    }
