"""Lets vLLM's CPU worker start in a process that has loaded Numba, as merging on the CPU does."""

from collections.abc import Mapping


def apply() -> None:
    """Shadow the builtin `vars` in vllm.triton_utils.dispatcher."""
    from vllm.triton_utils import dispatcher

    dispatcher.vars = attributes


def attributes(value) -> Mapping:
    """vars(value), but none of an object that answers to any name, __dict__ too, with a function of its library."""
    found = vars(value)
    return found if isinstance(found, Mapping) else {}
