"""Lets the plugin see the finished arguments before vLLM derives anything from them."""

import sys
from functools import wraps

from pydantic import ValidationError


class Refusal(ValueError):
    """What start-up refuses. Uncaught, it ends the process with its message as one line, without a traceback."""


def apply() -> None:
    """Wrap VllmConfig.try_verify_and_update_config, the first thing its __post_init__ calls on the model, and
    VllmConfig.__init__, which would say pydantic's words around what that raises.
    """
    from vllm.config import VllmConfig

    original, original_init = VllmConfig.try_verify_and_update_config, VllmConfig.__init__
    if hasattr(original, "deltamem"):
        return

    @wraps(original)
    def verify(self):
        from vllm_deltamem.startup import check_sizes, configure

        _refusing(configure, self)
        original(self)
        _refusing(check_sizes, self)

    @wraps(original_init)
    def init(self, *args, **kwargs):
        try:
            original_init(self, *args, **kwargs)
        except ValidationError as error:
            reasons = [detail.get("ctx", {}).get("error") for detail in error.errors()]
            refusals = [reason for reason in reasons if isinstance(reason, Refusal)]
            if not refusals:
                raise
            _end_in_one_line()
            raise refusals[0] from None

    verify.deltamem = True
    VllmConfig.try_verify_and_update_config, VllmConfig.__init__ = verify, init


def _refusing(check, vllm_config) -> None:
    try:
        check(vllm_config)
    except ValueError as error:
        raise Refusal(str(error)) from None


def _end_in_one_line() -> None:
    """Let the interpreter print an uncaught Refusal without its traceback."""
    show = sys.excepthook
    if hasattr(show, "deltamem"):
        return

    def say(kind, error, traceback):
        if issubclass(kind, Refusal):
            print(f"deltamem: {error}", file=sys.stderr)
        else:
            show(kind, error, traceback)

    say.deltamem = True
    sys.excepthook = say
