"""The command `deltamem`: layouts, sessions in a directory, and errors that end it with exit code 2."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest.mock import patch

import pytest
import torch
from model_configs import GEMMA4, JAMBA, MIXED, save_config

from vllm_deltamem.cli import main
from vllm_deltamem.sessionname import tenant_of
from vllm_deltamem.sessions import Fingerprint, SessionStore
from vllm_deltamem.sessionsettings import SessionSettings

FULL = 4 * 2 * 2 * 32 * 2 * 4096  # layers, kv heads, key and value, head size, bytes, positions


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(save_config(tmp_path_factory.mktemp("llama")))


def facts(capsys) -> dict[str, str]:
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    return {line[:18].strip(): line[18:].strip() for line in lines if not line.startswith("(")}


def number(fact: str) -> int:
    return int(fact.split()[0].replace(",", ""))


def test_info(llama, capsys):
    assert main(["info", llama]) == 0
    found = facts(capsys)
    assert number(found["full attention"]) == FULL and found["full attention"].endswith("4,096")
    assert 0.8 * 0.15 * FULL < number(found["bytes per sequence"]) <= 0.16 * FULL
    assert found["reduction"].startswith("85.")
    assert found["profile"].startswith("none") and found["fidelity"].startswith("k8v4")


def test_info_follows_settings_and_flags(llama, capsys):
    settings = {"memory": 512, "window": 100, "segment": 32, "sinks": 2, "pinned": 5, "fidelity": "bf16"}
    config = json.dumps({"deltamem": settings})
    assert main(["info", llama, "--additional-config", config, "--max-model-len", "1024"]) == 0
    found = facts(capsys)
    assert number(found["full attention"]) == FULL // 4
    assert [number(found[name]) for name in ("window", "segment", "sinks")] == [100, 32, 2]
    assert found["pinned"] == "at most 5 tokens" and found["fidelity"].startswith("bf16")


def test_info_says_what_is_short(llama, capsys):
    """At least two parts of at least 256 tokens."""
    for memory, parts in ((3500, 13), (500, 1)):
        assert main(["info", llama, "--additional-config", json.dumps({"deltamem": {"memory": memory}})]) == 0
        found = facts(capsys)
        size = number(found["bytes per sequence"]) // parts
        said = f"up to 3,327 tokens, exact: a part of {size:,} bytes, {parts} to a slot, for every 256 tokens"
        assert found.get("short sequences") == (said if parts > 1 else None)


def test_info_of_a_model_that_mixes_windows(tmp_path, capsys):
    save_config(tmp_path, MIXED)
    assert main(["info", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    full = FULL // 4 + 3 * FULL // 4 // 64  # three of four layers hold 64 of 4,096 positions
    assert f"full attention      {full:,} at" in said
    table = said.split("\n\n")[1].splitlines()
    assert table[1] == "0-2        the last 64 tokens, exact" and table[2].startswith("3 ")


@pytest.mark.parametrize("fast", [False, True], ids=["slow bf16", "fast bf16"])
def test_info_of_a_hybrid_model_counts_its_states(tmp_path, capsys, fast):
    """Which vLLM keeps in fp32 on CPUs with AVX512_BF16."""
    save_config(tmp_path, JAMBA)
    with patch("torch.cpu._is_avx512_bf16_supported", return_value=fast):
        assert main(["info", str(tmp_path)]) == 0
    found = facts(capsys)
    inner, state = 2 * JAMBA["hidden_size"], 4 if fast else 2
    states = JAMBA["num_hidden_layers"] // 2 * inner * (2 * 3 + state * 16)  # three inputs of a convolution, 16 states
    assert found["recurrent layers"] == f"{states:,} bytes of states, counted in all of these"
    assert number(found["full attention"]) == FULL // 2 + states, "two of four layers attend"
    assert 0.8 * 0.15 * FULL / 2 < number(found["bytes per sequence"]) - states <= 0.16 * FULL / 2
    assert found["heads"].startswith("2 layers x ")


def test_info_of_a_model_whose_layers_have_unequal_heads(tmp_path, capsys):
    save_config(tmp_path, GEMMA4)
    assert main(["info", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    full = FULL // 4 + 3 * FULL // 4 // 64  # one head of 64 in place of two of 32
    assert f"full attention      {full:,} at" in said
    assert "4 layers x 1 kv heads of size 64 (sliding: 2 of size 32)" in said


def test_info_of_two_workers_counts_both(llama, capsys):
    assert main(["info", llama]) == 0
    one = facts(capsys)
    assert main(["info", llama, "--tensor-parallel-size", "2"]) == 0
    two = facts(capsys)
    assert number(two["per worker"]) * 2 == number(two["bytes per sequence"])
    assert abs(number(two["bytes per sequence"]) / number(one["bytes per sequence"]) - 1) < 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--additional-config", '{"deltamem": {"memroy": 1}}'], "deltamem: Unknown deltamem setting 'memroy'"),
        (["--additional-config", '{"deltamem": {"memory": 8}}'], "deltamem: A deltamem memory of 8 tokens"),
        (["--additional-config", "{"], "not JSON"),
        (["--max-model-len", "many"], "invalid int value"),
    ],
)
def test_errors_are_for_people(llama, capsys, arguments, message):
    try:
        code = main(["info", llama, *arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    said = capsys.readouterr().err
    assert code == 2 and message in said
    assert "Traceback" not in said and "pydantic" not in said


def test_calibrate_knows_its_options(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["calibrate", "--help"])
    assert exit.value.code == 0 and "--output" in capsys.readouterr().out


@pytest.fixture
def directory(tmp_path):
    """Sessions of two API keys."""
    store = SessionStore(SessionSettings(directory=str(tmp_path)), Fingerprint("m", "p", "s", "1", "d", "v"))
    for key, names in (("ann", ("one", "two")), ("bob", ("three",))):
        for name in names:
            store.save(tenant_of(key), name, range(50), torch.zeros(1000, dtype=torch.uint8))
    return str(tmp_path)


def sessions(*arguments):
    return main(["sessions", *arguments])


def test_sessions_of_a_directory(directory, capsys):
    assert sessions("list", "--directory", directory, "--api-key", "ann") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "tokens", "bytes", "age"]
    assert sorted(row.split()[:3] for row in rows) == [["one", "50", "1,000"], ["two", "50", "1,000"]]

    assert sessions("erase", "three", "--directory", directory, "--api-key", "ann") == 2
    assert "there is no session three" in capsys.readouterr().err
    assert sessions("erase", "three", "--directory", directory, "--api-key", "bob") == 0
    assert sessions("erase", "three", "--directory", directory, "--api-key", "bob") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["list", "--directory", "nowhere"], "nowhere is not a directory of sessions"),
        (["list", "--url", "http://127.0.0.1:9"], "cannot reach http://127.0.0.1:9"),
        (["list", "--url", "127.0.0.1"], "'127.0.0.1' is no server with sessions"),
        (["list", "--url", ""], "'' is no server with sessions"),
        (["list", "--url", "http://127.0.0.1:port"], "is no server with sessions"),
        (["list"], "one of the arguments --directory --url is required"),
    ],
)
def test_sessions_errors(capsys, arguments, message):
    try:
        code = sessions(*arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"{}", b"[]", b"<html>", b'{"object": "error"}'])
def test_a_server_without_sessions(capsys, answer):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert sessions("list", "--url", f"http://127.0.0.1:{server.server_port}") == 2
        server.shutdown()
    assert "is no server with sessions of deltamem" in capsys.readouterr().err


def test_sessions_of_an_encrypted_directory(tmp_path, capsys):
    pytest.importorskip("cryptography")
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    settings = SessionSettings(directory=str(tmp_path / "sealed"), key_file=str(key))
    store = SessionStore(settings, Fingerprint("m", "p", "s", "1", "d", "v"))
    store.save(tenant_of(None), "hidden", range(9), torch.zeros(100, dtype=torch.uint8))
    where = ["--directory", str(tmp_path / "sealed")]
    assert sessions("list", *where) == 2
    assert "written with another key" in capsys.readouterr().err
    assert sessions("list", *where, "--key-file", str(key)) == 0
    assert "hidden" in capsys.readouterr().out
