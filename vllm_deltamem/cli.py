"""The command `deltamem`. What goes wrong ends it with one line on stderr and exit code 2."""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request

UNLIMITED = 1 << 61


def main(argv: list[str] | None = None) -> int:
    """The command `deltamem`; returns its exit status."""
    # vLLM logs to stdout, where the output of these commands goes.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(calibrates=argv[:1] == ["calibrate"]).parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"deltamem: {_said(error)}", file=sys.stderr)
        return 2
    return 0


def _parser(calibrates: bool) -> argparse.ArgumentParser:
    """calibrates: whether to know the options of that command, which takes importing torch."""
    parser = argparse.ArgumentParser(prog="deltamem", description="A working memory of fixed size for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="print the layout of a model's memory, without loading weights")
    info.add_argument("model", help="folder of a Hugging Face model, or its name")
    info.add_argument("--additional-config", type=_json, default={}, metavar="JSON", help="as for `vllm serve`")
    info.add_argument("--max-model-len", type=int, metavar="N", help="default: the model's context")
    info.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    info.set_defaults(run=_info)

    calibrate = commands.add_parser("calibrate", help="make the profile of a model")
    if calibrates:
        from vllm_deltamem import calibrate as calibration

        calibration.add_arguments(calibrate)
        calibrate.set_defaults(run=calibration.run)

    sessions = commands.add_parser("sessions", help="list or erase saved sessions")
    actions = sessions.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the sessions of an API key, newest first")
    erasing = actions.add_parser("erase", help="erase a session for good")
    erasing.add_argument("name")
    for action, run in ((listing, _list), (erasing, _erase)):
        where = action.add_mutually_exclusive_group(required=True)
        where.add_argument("--directory", help="the server's setting sessions.directory")
        where.add_argument("--url", help="a running server with VLLM_PLUGINS=deltamem,deltamem_sessions")
        action.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="default: $VLLM_API_KEY")
        action.add_argument("--key-file", help="the server's setting sessions.key_file, with --directory")
        action.add_argument("--key-env", help="the server's setting sessions.key_env, with --directory")
        action.set_defaults(run=run)
    return parser


def _info(args: argparse.Namespace) -> None:
    from vllm_deltamem.layoutreport import report
    from vllm_deltamem.plan import plan_memory
    from vllm_deltamem.startup import engine_config

    config = engine_config(
        args.model,
        additional_config=args.additional_config,
        max_model_len=args.max_model_len,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    print(report(plan_memory(config)))


def _list(args: argparse.Namespace) -> None:
    found = _open(args).summaries(_tenant(args)) if args.url is None else _ask(args, "GET", "", "data")
    print(f"{'name':<32}{'tokens':>10}{'bytes':>16}{'age':>12}")
    for session in found:
        tokens, size, age = session["tokens"], session["bytes"], session["age_s"]
        print(f"{session['name']:<32}{tokens:>10,}{size:>16,}{age:>10.0f} s")


def _erase(args: argparse.Namespace) -> None:
    if args.url is not None:
        _ask(args, "DELETE", "/" + urllib.parse.quote(args.name, safe=""), "deleted")
    elif not _open(args).erase(_tenant(args), args.name):
        raise ValueError(f"there is no session {args.name}")
    print(f"erased {args.name}")


def _open(args: argparse.Namespace):
    """The store on a directory, without limits: expiry and quotas are the server's business."""
    from vllm_deltamem.sessiondirectory import MARKER
    from vllm_deltamem.sessions import Fingerprint, SessionStore
    from vllm_deltamem.sessionsettings import SessionSettings

    if not os.path.exists(os.path.join(args.directory, MARKER)):
        raise ValueError(f"{args.directory} is not a directory of sessions: it has no {MARKER}")
    settings = SessionSettings(
        directory=args.directory,
        key_file=args.key_file,
        key_env=args.key_env,
        max_sessions=UNLIMITED,
        max_bytes=UNLIMITED,
        max_age_s=UNLIMITED,
    )
    return SessionStore(settings, Fingerprint(*["any"] * 6))  # nothing is restored here


def _tenant(args: argparse.Namespace) -> str:
    from vllm_deltamem.sessionname import tenant_of

    return tenant_of(args.api_key)


def _ask(args: argparse.Namespace, method: str, path: str, wanted: str):
    """A field of what the server's session routes answer. Raises ValueError with what the server said instead."""
    from vllm_deltamem.sessionname import SESSIONS_PATH

    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    url = f"{args.url.rstrip('/').removesuffix('/v1')}{SESSIONS_PATH}"
    try:
        request = urllib.request.Request(url + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)[wanted]
    except urllib.error.HTTPError as error:
        raise ValueError(f"{args.url} answers {error.code}: {_message(error.read())}") from error
    except urllib.error.URLError as error:
        raise ValueError(f"cannot reach {args.url}: {error.reason}") from error
    except (ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        raise ValueError(f"{args.url!r} is no server with sessions of deltamem, or answers as none") from error


def _message(body: bytes) -> str:
    """The message in a server's error, whatever its shape."""
    try:
        said = json.loads(body)["error"]
        return said if isinstance(said, str) else said["message"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]


def _json(text: str) -> dict:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


def _said(error: Exception) -> str:
    """The message of an error, without what pydantic puts around it."""
    if hasattr(error, "errors"):
        return "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
    return str(error)
