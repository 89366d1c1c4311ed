"""Options of `vllm serve` as the `args` of an application on Ray Serve, in YAML."""

import argparse
import json
from typing import Any


def parse(options: dict[str, Any]) -> argparse.Namespace:
    """What `vllm serve` makes of them. Raises ValueError, and what vLLM raises, for what it refuses."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:  # argparse's own would end the replica without a word to Ray
            raise ValueError(f"args of the application: {message}")

    parser = make_arg_parser(Parser())
    args = parser.parse_args(command_line(options, parser))
    validate_parsed_serve_args(args)
    return args


def command_line(options: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Options as arguments of `vllm serve`: a truth value is a flag, nothing leaves the option out.

    A list is many values where the parser takes them, one after the other or each with the option's name; where it
    takes one value, a list is JSON, as a mapping is.
    """
    arguments = []
    for name, value in options.items():
        action = parser._option_string_actions.get("--" + name.replace("_", "-"))
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
            arguments += [word for item in value for word in _pair(name, item)]
        elif isinstance(value, list) and (action is None or action.nargs in ("+", "*")):
            arguments += [f"--{name}", *map(_text, value)]
        elif value is not None:
            arguments += _pair(name, value)
    return arguments


def _pair(name: str, value: Any) -> list[str]:
    """An option and its value; as one where the value would be taken for an option."""
    text = _text(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
