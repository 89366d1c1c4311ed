"""Sessions: what was saved comes back byte for byte or not at all, whatever happens to process or file."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from vllm_deltamem import sessiondirectory, sessions, sessionsweep
from vllm_deltamem.seal import PIECE, TAG
from vllm_deltamem.sessionfile import VERSION
from vllm_deltamem.sessionname import tenant_of
from vllm_deltamem.sessions import Fingerprint, SessionRefused, SessionSettings, SessionStore

KEY, OTHER_KEY = "5a" * 32, "a5" * 32
FINGERPRINT = Fingerprint("model@rev", "profile", "settings", "1", "bfloat16", "0.32.0")
ALICE, BOB = tenant_of("alice's key"), tenant_of("bob's key")
GONE = {"truncated", "altered", "foreign", "version", "key"}  # reasons to refuse a damaged file


@pytest.fixture(params=[None, "DELTAMEM_TEST_KEY"], ids=["clear", "sealed"])
def key_env(request, monkeypatch):
    monkeypatch.setenv("DELTAMEM_TEST_KEY", KEY)
    return request.param


def open_store(directory, key_env=None, fingerprint=FINGERPRINT, host_bytes=0, **settings):
    directory = str(directory) if directory else None
    return SessionStore(
        SessionSettings(directory=directory, key_env=key_env, host_bytes=host_bytes, **settings), fingerprint
    )


def random_slab(n_bytes=3000, seed=0):
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def files_of(directory, pattern="*/*"):
    return sorted(directory.glob(pattern))


def only_file(directory):
    (path,) = files_of(directory)
    return path


def refused(call, *args, **kwargs):
    with pytest.raises(SessionRefused) as caught:
        call(*args, **kwargs)
    return caught.value


# What comes back


@pytest.mark.parametrize("n_bytes", [1, 3000, PIECE - 1, PIECE, 2 * PIECE + 1])
def test_a_restarted_store_restores_what_was_saved(tmp_path, key_env, n_bytes):
    slab, tokens = random_slab(n_bytes), [0, 7, 2**31 - 1]
    saved = open_store(tmp_path, key_env).save(ALICE, "chat", tokens, slab)
    store = open_store(tmp_path, key_env)
    peeked, restored = store.peek(ALICE, "chat"), store.restore(ALICE, "chat", saved.save_id)
    assert peeked.header == restored.header == saved
    assert peeked.tokens.tolist() == restored.tokens.tolist() == tokens
    assert peeked.slab is None and torch.equal(restored.slab, slab)


@pytest.mark.parametrize("host_bytes", [0, 10_000])
def test_an_earlier_memory_is_kept_beside_the_last(tmp_path, key_env, host_bytes):
    slab, earlier = random_slab(), random_slab(seed=1)
    store = open_store(tmp_path, key_env, host_bytes=host_bytes)
    saved = store.save(ALICE, "chat", range(9), slab, earlier=(5, earlier))
    assert saved.n_earlier == 5 and store.peek(ALICE, "chat").header == saved
    for each in (store, open_store(tmp_path, key_env)):
        assert torch.equal(each.restore(ALICE, "chat", saved.save_id).slab, slab)
        assert torch.equal(each.restore(ALICE, "chat", saved.save_id, earlier=True).slab, earlier)
        assert each.summaries(ALICE)[0]["bytes"] == 6000
    store.save(ALICE, "chat", range(9), slab)
    assert refused(store.restore, ALICE, "chat", earlier=True).reason == "replaced"
    small = open_store(tmp_path, key_env, max_bytes=5999)
    assert not small.save(ALICE, "chat", range(9), slab, earlier=(5, earlier)).n_earlier, "no room for both"


def test_damage_to_an_earlier_memory_leaves_the_last(tmp_path, key_env):
    store = open_store(tmp_path, key_env)
    store.save(ALICE, "chat", range(9), random_slab(), earlier=(5, random_slab(seed=1)))
    path, out = only_file(tmp_path), torch.ones(3000, dtype=torch.uint8)
    raw = path.read_bytes()
    path.write_bytes(raw[:-99] + bytes([raw[-99] ^ 1]) + raw[-98:])
    assert torch.equal(store.restore(ALICE, "chat").slab, random_slab())
    assert refused(store.restore, ALICE, "chat", out=out, earlier=True).reason == "altered" and not out.any()
    path.write_bytes(raw[:-99])
    assert refused(store.restore, ALICE, "chat").reason == "truncated"


def test_the_caller_can_give_the_buffer(tmp_path, key_env):
    store, slab, out = open_store(tmp_path, key_env), random_slab(), torch.ones(3000, dtype=torch.uint8)
    store.save(ALICE, "chat", torch.arange(5), slab)
    assert store.restore(ALICE, "chat", out=out).slab is out
    assert torch.equal(out, slab)
    assert refused(store.restore, ALICE, "chat", out=out[1:]).reason == "size"


@pytest.mark.parametrize("with_directory", [True, False])
def test_host_memory_answers_without_reading_the_slab(tmp_path, monkeypatch, with_directory):
    store = open_store(tmp_path if with_directory else None, host_bytes=10_000)
    saved = store.save(ALICE, "chat", [1, 2], random_slab())
    monkeypatch.setattr(sessions.SessionFile, "slab", None)
    restored = store.restore(ALICE, "chat")
    assert torch.equal(restored.slab, random_slab()) and store.peek(ALICE, "chat").tokens.tolist() == [1, 2]
    restored.slab.zero_()
    assert torch.equal(store.restore(ALICE, "chat", saved.save_id).slab, random_slab()), "not a shared buffer"
    assert refused(store.restore, ALICE, "chat", "0" * 32).reason == "replaced"
    assert store.list(ALICE) == [saved] and store.list(BOB) == []
    assert store.erase(ALICE, "chat") and store.restore(ALICE, "chat") is None


def test_a_later_save_replaces_the_earlier_one_even_if_the_clock_went_back(tmp_path, key_env, monkeypatch):
    store = open_store(tmp_path, key_env)
    first = store.save(ALICE, "chat", [1], random_slab(seed=1))
    monkeypatch.setattr(time, "time_ns", lambda: first.created_ns - 10**10)
    second = store.save(ALICE, "chat", [1, 2], random_slab(4000, seed=2))
    assert torch.equal(store.restore(ALICE, "chat").slab, random_slab(4000, seed=2))
    assert refused(store.restore, ALICE, "chat", first.save_id).reason == "replaced"
    assert len(files_of(tmp_path)) == 1 and store.list(ALICE) == [second]


def test_a_clear_file_is_plain_safetensors(tmp_path):
    from safetensors import safe_open

    open_store(tmp_path).save(ALICE, "chat", [3, 1, 4], random_slab())
    with safe_open(only_file(tmp_path), "pt") as file:
        assert file.get_tensor("tokens").tolist() == [3, 1, 4]
        assert torch.equal(file.get_tensor("slab"), random_slab())
        assert file.metadata()["format"] == "deltamem-session" and file.metadata()["version"] == VERSION


def test_a_sealed_file_is_safetensors_that_tells_nothing(tmp_path, monkeypatch):
    from safetensors import safe_open

    monkeypatch.setenv("K", KEY)
    slab = torch.frombuffer(bytearray(b"the secret of the slab" * 99), dtype=torch.uint8)
    open_store(tmp_path, "K").save(ALICE, "my-session", [0x41424344] * 9, slab)
    raw = only_file(tmp_path).read_bytes()
    for secret in (b"secret", b"my-session", b"my-session".hex().encode(), b"DCBADCBA", ALICE.encode()):
        assert secret not in raw
    with safe_open(only_file(tmp_path), "pt") as file:
        assert set(file.keys()) == {"tokens", "slab"}


def test_equal_bytes_are_sealed_unequally(tmp_path, monkeypatch):
    monkeypatch.setenv("K", KEY)
    store, sealed = open_store(tmp_path, "K"), []
    for tenant, name in ((ALICE, "a"), (ALICE, "b"), (BOB, "a")):
        store.save(tenant, name, [0] * 100, torch.zeros(2 * PIECE, dtype=torch.uint8))
    for path in files_of(tmp_path):
        raw = path.read_bytes()
        slab = len(raw) - 2 * (PIECE + TAG)
        sealed += [raw[start : start + 400] for start in (slab - 400 - TAG, slab, slab + PIECE + TAG)]
    assert len(set(sealed)) == 9, "no key stream is used twice"


# Damaged and foreign files


def damaged(directory, store, data):
    """Restore and peek a session after its file was changed to `data`: the reason for which it is refused."""
    only_file(directory).write_bytes(data)
    out = torch.zeros(3000, dtype=torch.uint8)
    error = refused(store.restore, ALICE, "chat", out=out)
    assert not out.any(), "nothing of a refused slab may stay in the caller's buffer"
    return error.reason


def test_truncated_anywhere(tmp_path, key_env):
    store = open_store(tmp_path, key_env)
    store.save(ALICE, "chat", list(range(500)), random_slab())
    whole = only_file(tmp_path).read_bytes()
    for cut in [*range(0, 16), *range(16, len(whole), 97), len(whole) - 17, len(whole) - 16, len(whole) - 1]:
        assert damaged(tmp_path, store, whole[:cut]) == "truncated"
        assert refused(store.peek, ALICE, "chat").reason == "truncated"
    assert damaged(tmp_path, store, whole + b"\0") == "altered"
    only_file(tmp_path).write_bytes(whole)
    assert torch.equal(store.restore(ALICE, "chat").slab, random_slab())


def test_a_bit_flipped_anywhere(tmp_path, key_env):
    store, flip = open_store(tmp_path, key_env), random.Random(0)
    store.save(ALICE, "chat", list(range(100)), random_slab())
    whole = only_file(tmp_path).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in [*range(0, header + 500, 2), *range(header + 500, len(whole), 29), len(whole) - 1]:
        data = bytearray(whole)
        data[position] ^= 1 << flip.randrange(8)
        assert damaged(tmp_path, store, data) in GONE


def test_a_new_save_heals_a_damaged_session(tmp_path, key_env):
    store = open_store(tmp_path, key_env)
    store.save(ALICE, "chat", [1], random_slab())
    only_file(tmp_path).write_bytes(b"nonsense")
    assert refused(store.peek, ALICE, "chat").reason == "foreign" and store.list(ALICE) == []
    store.save(ALICE, "chat", [1, 2], random_slab())
    assert store.restore(ALICE, "chat").tokens.tolist() == [1, 2] and len(files_of(tmp_path)) == 1


def test_foreign_files(tmp_path, key_env):
    from safetensors.torch import save

    store = open_store(tmp_path, key_env)
    store.save(ALICE, "chat", [1], random_slab())
    tensors = {"tokens": torch.tensor([1], dtype=torch.int32), "slab": random_slab()}
    own = {"format": "deltamem-session", "version": VERSION}
    assert damaged(tmp_path, store, save(tensors)) == "foreign"
    assert damaged(tmp_path, store, save(tensors, {"format": "pt"})) == "foreign"
    assert damaged(tmp_path, store, save(tensors, own)) in {"altered", "key"}
    assert damaged(tmp_path, store, save(tensors, own | {"version": "1"})) == "version"
    torch.save(tensors, tmp_path / "pickle")
    assert damaged(tmp_path, store, (tmp_path / "pickle").read_bytes()) == "foreign"
    for text in (b"[]", b"{}", b'{"__metadata__": 3}', b"[" * 60000):
        assert damaged(tmp_path, store, len(text).to_bytes(8, "little") + text) == "foreign"


def test_a_link_to_another_file_is_not_followed(tmp_path, key_env):
    store = open_store(tmp_path, key_env)
    store.save(ALICE, "chat", [1], random_slab())
    path = only_file(tmp_path)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert refused(store.restore, ALICE, "chat").reason == "unreadable"
    assert refused(store.erase, ALICE, "chat").reason == "unwritable"
    assert any((tmp_path / "elsewhere").read_bytes())


# Keys, tenants, fingerprints, names


def test_a_directory_has_one_key(tmp_path, monkeypatch):
    monkeypatch.setenv("K", KEY)
    monkeypatch.setenv("OTHER", OTHER_KEY)
    for first, second in (("K", "OTHER"), ("K", None), (None, "K")):
        directory = tmp_path / f"{first}-{second}"
        open_store(directory, first).save(ALICE, "chat", [1], random_slab())
        with pytest.raises(ValueError, match="another key"):
            open_store(directory, second)


@pytest.mark.parametrize(("ours", "theirs"), [("K", "OTHER"), ("K", None), (None, "K")])
def test_a_file_under_another_key_is_refused(tmp_path, monkeypatch, ours, theirs):
    monkeypatch.setenv("K", KEY)
    monkeypatch.setenv("OTHER", OTHER_KEY)
    store = open_store(tmp_path / "ours", ours)
    store.save(ALICE, "chat", [1], random_slab())
    open_store(tmp_path / "theirs", theirs).save(ALICE, "chat", [1], random_slab())
    foreign = only_file(tmp_path / "theirs").read_bytes()
    assert damaged(tmp_path / "ours", store, foreign) == "key"
    if ours and theirs:  # whoever writes our key's id into the header does not have our key
        mine, his = (
            store.directory.seal.key_id,
            open_store(tmp_path / "theirs", theirs).directory.seal.key_id,
        )
        assert damaged(tmp_path / "ours", store, foreign.replace(his.encode(), mine.encode())) == "altered"


def test_one_tenant_does_not_reach_the_sessions_of_another(tmp_path, key_env):
    store = open_store(tmp_path, key_env, host_bytes=100_000)
    store.save(ALICE, "chat", [1], random_slab())
    assert store.peek(BOB, "chat") is None and store.restore(BOB, "chat") is None
    assert store.list(BOB) == [] and not store.erase(BOB, "chat")
    assert tenant_of(None) not in {ALICE, tenant_of("")}
    assert store.peek(ALICE, "chat") is not None


def test_a_file_moved_to_another_tenant_or_name_is_refused(tmp_path, key_env):
    store = open_store(tmp_path, key_env)
    store.save(ALICE, "chat", [1], random_slab())
    source = only_file(tmp_path)
    for tenant, name in ((BOB, "chat"), (ALICE, "other"), (BOB, "other")):
        store.save(tenant, name, [1], random_slab())
        (target,) = [path for path in files_of(tmp_path) if path != source]
        shutil.copy(source, target.with_name(target.name[:32] + source.name[32:]))
        target.unlink()
        assert refused(store.restore, tenant, name).reason == "altered"
        assert refused(store.peek, tenant, name).reason == "altered"
        store.erase(tenant, name)
    newer = source.name.split("-")
    newer[1] = f"{int(newer[1], 16) + 10**12:016x}"
    os.rename(source, source.with_name("-".join(newer)))
    assert refused(store.restore, ALICE, "chat").reason == "altered"


@pytest.mark.parametrize("field", ["model", "profile", "settings", "state", "dtype", "vllm", "tp_size"])
def test_another_fingerprint_is_refused_and_the_field_named(tmp_path, key_env, field):
    open_store(tmp_path, key_env).save(ALICE, "chat", [1], random_slab())
    value = 2 if field == "tp_size" else "another"
    other = open_store(tmp_path, key_env, replace(FINGERPRINT, **{field: value}), host_bytes=9000)
    for call in (other.peek, other.restore):
        error = refused(call, ALICE, "chat")
        assert error.reason == "fingerprint" and f"{field} is {value} here" in str(error)
    assert len(other.list(ALICE)) == 1, "it can still be listed and erased"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "-x",
        "a b",
        "a\n",
        "a\0",
        "é",
        "x" * 129,
        None,
        b"a",
    ],
)
def test_untrusted_names(tmp_path, name):
    store = open_store(tmp_path)
    for call in (store.peek, store.restore, store.erase, lambda *who: store.save(*who, [1], random_slab())):
        with pytest.raises(ValueError, match="session name"):
            call(ALICE, name)
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("tenant", ["", "alice's key", "../" + "0" * 61, ALICE.upper(), ALICE + "\n", None])
def test_untrusted_tenants(tmp_path, tenant):
    store = open_store(tmp_path)
    for call in (store.peek, store.restore, store.erase, lambda *who: store.save(*who, [1], random_slab())):
        with pytest.raises(ValueError, match="tenant"):
            call(tenant, "chat")
    with pytest.raises(ValueError, match="tenant"):
        store.list(tenant)


def test_file_names_and_modes_reveal_nothing(tmp_path, key_env):
    directories = [tmp_path / "1", tmp_path / "2"]
    for directory in directories:
        open_store(directory, key_env).save(ALICE, "chat", [1], random_slab())
        path = only_file(directory)
        assert "chat" not in str(path.relative_to(tmp_path)) and ALICE[:16] not in str(path)
        assert path.stat().st_mode & 0o077 == path.parent.stat().st_mode & 0o077 == 0
        assert directory.stat().st_mode & 0o077 == 0
    first, second = (only_file(directory) for directory in directories)
    assert first.parent.name != second.parent.name and first.name[:32] != second.name[:32], "salted"


def test_what_cannot_be_saved(tmp_path):
    store, slab = open_store(tmp_path, max_bytes=4000), random_slab()
    for tokens in ([], [-1], [2**31], [[1, 2]]):
        with pytest.raises(ValueError, match="tokens"):
            store.save(ALICE, "chat", tokens, slab)
    for bad in (slab.float(), slab.view(30, 100), slab[::2]):
        with pytest.raises(ValueError, match="slab"):
            store.save(ALICE, "chat", [1], bad)
    for save_id in ("", "x" * 32, "../../x"):
        with pytest.raises(ValueError, match="save_id"):
            store.save(ALICE, "chat", [1], slab, save_id)
    assert refused(store.save, ALICE, "chat", [1], random_slab(4001)).reason == "size"
    assert refused(open_store(None, host_bytes=10).save, ALICE, "chat", [1], slab).reason == "size"
    assert files_of(tmp_path) == []


# Tensor parallelism


def test_ranks_agree_on_the_newest_save_that_all_have(tmp_path, key_env):
    ranks = [replace(FINGERPRINT, tp_size=2, tp_rank=rank) for rank in range(2)]
    stores = [open_store(tmp_path, key_env, rank, host_bytes=9000) for rank in ranks]
    first, second = (stores[0].begin(ALICE, "chat") for _ in range(2))
    stores[0].save(ALICE, "chat", [1], random_slab(seed=10), first)
    assert refused(stores[0].peek, ALICE, "chat").reason == "incomplete"
    stores[0].save(ALICE, "chat", [1, 2], random_slab(seed=20), second)
    stores[1].save(ALICE, "chat", [1], random_slab(seed=11), first)
    for rank, store in enumerate(stores):
        assert store.peek(ALICE, "chat").header.save_id == first
        assert torch.equal(store.restore(ALICE, "chat", first).slab, random_slab(seed=10 + rank))
    stores[1].save(ALICE, "chat", [1, 2], random_slab(seed=21), second)
    for rank, store in enumerate(stores):
        assert store.peek(ALICE, "chat").tokens.tolist() == [1, 2]
        assert torch.equal(store.restore(ALICE, "chat", second).slab, random_slab(seed=20 + rank))
        assert refused(store.restore, ALICE, "chat", first).reason == "replaced"
    assert len(files_of(tmp_path)) == 2 and len(stores[0].list(ALICE)) == 1
    assert "tp_size is 1 here" in str(refused(open_store(tmp_path, key_env).peek, ALICE, "chat"))
    files_of(tmp_path)[1].write_bytes(b"")
    assert refused(stores[0].peek, ALICE, "chat").reason == "truncated", "the scheduler sees another rank's damage"
    stores[0].erase(ALICE, "chat")
    assert files_of(tmp_path) == [] and stores[1].restore(ALICE, "chat") is None


def test_ranks_need_a_save_id(tmp_path):
    rank = replace(FINGERPRINT, tp_size=2)
    with pytest.raises(ValueError, match="save_id"):
        open_store(tmp_path, fingerprint=rank).save(ALICE, "chat", [1], random_slab())


# Several at once


def turn_slab(turn, n_bytes):
    """A slab that only this turn has: a repeated 8-byte counter."""
    return torch.full((n_bytes // 8,), turn, dtype=torch.int64).view(torch.uint8)


def check_turn(session, n_bytes):
    """The turn of a restored session, which must be of one piece."""
    turn = int(session.tokens[0])
    assert session.tokens.tolist() == [turn] * (turn % 50 + 1)
    assert torch.equal(session.slab, turn_slab(turn, n_bytes))
    return turn


def save_turns(store, turns, n_bytes, done=lambda turn: None):
    for turn in turns:
        store.save(ALICE, "chat", [turn] * (turn % 50 + 1), turn_slab(turn, n_bytes))
        done(turn)


@pytest.mark.parametrize("with_directory", [True, False])
def test_threads_never_mix(tmp_path, key_env, with_directory):
    if key_env and not with_directory:
        pytest.skip("host memory is not encrypted")
    store = open_store(tmp_path if with_directory else None, key_env, host_bytes=1 << 20)
    save_turns(store, [0], 80_000)
    seen, failures, written = set(), [], threading.Event()
    turns = 8 if with_directory else 200

    def read():
        try:
            while not written.is_set():
                seen.add(check_turn(store.restore(ALICE, "chat"), 80_000))
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    ranges = [range(10_000 * w, 10_000 * w + turns) for w in range(1, 5)]
    writers = [threading.Thread(target=save_turns, args=(store, turns, 80_000)) for turns in ranges]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    written.set()
    for thread in readers:
        thread.join()
    assert failures == [] and len(seen) > 1
    assert check_turn(store.restore(ALICE, "chat"), 80_000) % 10_000 == turns - 1
    assert len(files_of(tmp_path)) == with_directory


PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def preload():
    """Children fork from a process that has imported what takes long but has used no thread."""
    PROCESSES.set_forkserver_preload(["pytest", "torch", "vllm_deltamem.sessions"])


def child(directory, key_env, environment, turns, n_bytes, pipe):
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = open_store(directory, key_env, host_bytes=1 << 20)
    save_turns(store, turns, n_bytes, pipe.send)
    pipe.close()


def start(directory, key_env, turns, n_bytes):
    receiver, sender = PROCESSES.Pipe(duplex=False)
    args = (directory, key_env, {"DELTAMEM_TEST_KEY": KEY}, turns, n_bytes, sender)
    process = PROCESSES.Process(target=child, args=args, daemon=True)
    process.start()
    sender.close()
    return process, receiver


def test_processes_never_mix(tmp_path, key_env):
    store = open_store(tmp_path, key_env, host_bytes=1 << 20)
    save_turns(store, [0], 800_000)
    children = [start(tmp_path, key_env, range(1000 * w, 1000 * w + 15), 800_000) for w in range(1, 4)]
    seen = set()
    while any(process.is_alive() for process, _ in children):
        seen.add(check_turn(store.restore(ALICE, "chat"), 800_000))
    for process, _ in children:
        process.join()
        assert process.exitcode == 0
    assert len(seen) > 3
    assert check_turn(store.restore(ALICE, "chat"), 800_000) % 1000 == 14
    assert len(files_of(tmp_path)) == 1


def test_killed_at_any_moment_loses_at_most_the_save_in_flight(tmp_path, key_env, monkeypatch):
    n_bytes, moment, turn, finished, in_flight = 4_000_000, random.Random(1), 0, -1, 0
    for _ in range(25):
        process, pipe = start(tmp_path, key_env, range(turn, turn + 10**6), n_bytes)
        finished = max(finished, pipe.recv())
        time.sleep(moment.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while True:
            try:
                finished = pipe.recv()
            except EOFError:
                break
        in_flight += len(files_of(tmp_path, "*/*.tmp")) > 0
        restored = check_turn(open_store(tmp_path, key_env).restore(ALICE, "chat"), n_bytes)
        assert restored in (finished, finished + 1)
        turn = restored + 1
    assert in_flight > 10, "the kills came between saves"
    monkeypatch.setattr(sessiondirectory, "YOUNG_S", 0)
    open_store(tmp_path, key_env).sweep()
    assert len(files_of(tmp_path)) == 1, "what the dead left is wiped"


def test_a_tenant_of_whom_nothing_is_left_has_no_folder(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.save(ALICE, "chat", [1], random_slab())
    monkeypatch.setattr(sessiondirectory, "YOUNG_S", 0)
    store.sweep()
    assert len(list(store.directory.tenants())) == 1
    store.erase(ALICE, "chat")
    store.sweep()
    assert not list(store.directory.tenants())
    store.save(ALICE, "chat", [1], random_slab())
    assert store.restore(ALICE, "chat")


def ranks_child(directory, key_env, environment, first_turn, n_bytes, pipe):
    os.environ.update(environment)
    torch.set_num_threads(1)
    stores = [open_store(directory, key_env, replace(FINGERPRINT, tp_size=2, tp_rank=r)) for r in range(2)]
    for turn in range(first_turn, first_turn + 10**6):
        save_id = stores[0].begin(ALICE, "chat")
        for rank, store in enumerate(stores):
            store.save(ALICE, "chat", [turn], turn_slab(2 * turn + rank, n_bytes), save_id)
        pipe.send(turn)


def test_ranks_killed_between_their_saves_keep_the_one_before(tmp_path, key_env):
    n_bytes, moment, turn, finished = 400_000, random.Random(2), 0, -1
    for _ in range(10):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        args = (tmp_path, key_env, {"DELTAMEM_TEST_KEY": KEY}, turn, n_bytes, sender)
        process = PROCESSES.Process(target=ranks_child, args=args, daemon=True)
        process.start()
        sender.close()
        finished = max(finished, receiver.recv())
        time.sleep(moment.uniform(0, 0.04))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while True:
            try:
                finished = receiver.recv()
            except EOFError:
                break
        for rank in range(2):
            store = open_store(tmp_path, key_env, replace(FINGERPRINT, tp_size=2, tp_rank=rank))
            peeked = store.peek(ALICE, "chat")
            turn = int(peeked.tokens[0])
            assert turn in (finished, finished + 1)
            slab = store.restore(ALICE, "chat", peeked.header.save_id).slab
            assert torch.equal(slab, turn_slab(2 * turn + rank, n_bytes))
        turn += 1


def test_replicas_see_one_anothers_saves_and_erasures(tmp_path, key_env):
    one, two = (open_store(tmp_path, key_env, host_bytes=1 << 20) for _ in range(2))
    one.save(ALICE, "chat", [1], random_slab(seed=1))
    two.save(ALICE, "chat", [1, 2], random_slab(seed=2))
    assert torch.equal(one.restore(ALICE, "chat").slab, random_slab(seed=2))
    buffer = one._host._copies[ALICE, "chat"].slabs[0]
    two.erase(ALICE, "chat")
    assert one.restore(ALICE, "chat") is None and not buffer.any()


def test_a_save_during_which_the_session_is_erased_leaves_nothing(tmp_path, key_env, monkeypatch):
    store = open_store(tmp_path, key_env, host_bytes=9000)
    store.save(ALICE, "chat", [1], random_slab())
    write = sessiondirectory.write_session

    def erase_while_writing(*args):
        write(*args)
        open_store(tmp_path, key_env).erase(ALICE, "chat")

    monkeypatch.setattr(sessiondirectory, "write_session", erase_while_writing)
    assert refused(store.save, ALICE, "chat", [1, 2], random_slab()).reason == "erased"
    assert files_of(tmp_path) == [] and store.restore(ALICE, "chat") is None


@pytest.mark.parametrize("with_directory", [True, False])
def test_a_turn_that_began_before_an_erasure_is_not_saved_after_it(tmp_path, key_env, with_directory):
    store = open_store(tmp_path if with_directory else None, key_env if with_directory else None, host_bytes=9000)
    other = open_store(tmp_path, key_env, host_bytes=9000) if with_directory else store
    before, ended = (store.begin(ALICE, "chat") for _ in range(2))
    store.end(ALICE, "chat", ended)
    assert other.erase(ALICE, "chat") and not other.erase(ALICE, "chat")
    assert refused(store.save, ALICE, "chat", [1], random_slab(), before).reason == "erased"
    after = store.begin(ALICE, "chat")
    assert refused(store.save, ALICE, "chat", [1], random_slab(), before).reason == "erased"
    store.save(ALICE, "chat", [2], random_slab(), after)
    for save_id in (before, after):
        store.end(ALICE, "chat", save_id)
    assert store.restore(ALICE, "chat").tokens.tolist() == [2]
    assert len(files_of(tmp_path)) == with_directory and store._host._begun == {}


@pytest.mark.parametrize("with_directory", [True, False])
def test_saves_and_an_erasure_at_once(tmp_path, with_directory):
    directory = tmp_path if with_directory else None
    store = open_store(directory, host_bytes=1 << 20)
    eraser = open_store(directory) if with_directory else store
    outcomes = set()

    def save(name, save_id):
        try:
            store.save(ALICE, name, [1], random_slab(), save_id)
            outcomes.add("saved first")
        except SessionRefused as error:
            outcomes.add(error.reason)

    for turn in range(60):
        begun = [store.begin(ALICE, "chat") for _ in range(3)]
        threads = [threading.Thread(target=save, args=("chat", save_id)) for save_id in begun]
        threads.insert(turn % 4, threading.Thread(target=eraser.erase, args=(ALICE, "chat")))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.peek(ALICE, "chat") is None and files_of(tmp_path) == []
    assert outcomes == {"saved first", "erased"}


def test_processes_wait_for_a_save_once_its_turn_is_over(tmp_path, key_env, monkeypatch):
    one, two = (open_store(tmp_path, key_env) for _ in range(2))
    save_id = one.begin(ALICE, "chat")
    assert not two.expects(ALICE, "chat"), "the turn lasts: nobody waits for it"
    one.expect(ALICE, "chat", save_id)
    assert two.expects(ALICE, "chat") and one.expects(ALICE, "chat")
    assert not two.expects(ALICE, "other") and not two.expects(BOB, "chat")
    write, seen = sessiondirectory.write_session, []

    def look_while_writing(*args):
        write(*args)
        seen.append(two.expects(ALICE, "chat"))

    monkeypatch.setattr(sessiondirectory, "write_session", look_while_writing)
    one.save(ALICE, "chat", [1], random_slab(), save_id)
    assert seen == [True] and not two.expects(ALICE, "chat")
    assert torch.equal(two.restore(ALICE, "chat").slab, random_slab()), "the mark is gone"
    one.expect(ALICE, "chat", save_id)
    assert not two.expects(ALICE, "chat"), "it is no longer begun"


def test_nobody_waits_for_a_save_that_does_not_come(tmp_path, monkeypatch):
    store, dead, slow, erased = (open_store(tmp_path) for _ in range(4))
    writers = {"dead": dead, "slow": slow, "erased": erased}
    for name, writer in writers.items():
        writer.expect(ALICE, name, writer.begin(ALICE, name))
        assert store.expects(ALICE, name)
    dead.directory._lock.close()  # as the death of its process does
    assert not store.expects(ALICE, "dead")
    assert store.erase(ALICE, "erased") and not store.expects(ALICE, "erased")
    monkeypatch.setattr(sessiondirectory, "STUCK_S", 0)
    assert not store.expects(ALICE, "slow")


def test_a_full_disk_refuses_the_save_and_keeps_the_session(tmp_path, key_env, monkeypatch):
    store = open_store(tmp_path, key_env)
    store.save(ALICE, "chat", [1], random_slab())

    def full(file, *_):
        file.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sessiondirectory, "write_session", full)
    error = refused(store.save, ALICE, "chat", [1, 2], random_slab())
    assert error.reason == "unwritable" and "No space left" in str(error)
    assert len(files_of(tmp_path)) == 1 and store.restore(ALICE, "chat").tokens.tolist() == [1]


def test_only_the_files_of_dead_writers_are_wiped(tmp_path, monkeypatch):
    store, dead, live = (open_store(tmp_path) for _ in range(3))
    abandoned, begun = dead.begin(ALICE, "a"), live.begin(ALICE, "b")
    dead.directory._lock.close()  # as the death of its process does
    store.sweep()
    assert len(files_of(tmp_path)) == 2, "too young to tell"
    monkeypatch.setattr(sessiondirectory, "YOUNG_S", 0)
    store.sweep()
    assert len(files_of(tmp_path)) == len(files_of(tmp_path, "*.writer")) == 1
    assert refused(dead.save, ALICE, "a", [1], random_slab(), abandoned).reason == "erased"
    live.save(ALICE, "b", [1], random_slab(), begun)
    assert store.restore(ALICE, "b") is not None


# Quotas, expiry, erasing


def names(store, tenant=ALICE):
    return {header.name for header in store.list(tenant)}


@pytest.mark.parametrize("quota", [{"max_sessions": 3}, {"max_bytes": 15_000}])
def test_the_least_recently_used_session_makes_room(tmp_path, key_env, quota):
    store = open_store(tmp_path, key_env, **quota)
    for name in "abc":
        store.save(ALICE, name, [1], random_slab())
        time.sleep(0.02)
    store.restore(ALICE, "a")
    store.save(ALICE, "d", [1], random_slab())
    assert names(store) == {"a", "c", "d"}
    assert store.restore(ALICE, "b") is None and len(files_of(tmp_path)) == 3


def test_saves_look_at_all_sessions_once_in_a_while(tmp_path, monkeypatch):
    store, looks = open_store(tmp_path, max_sessions=256), []
    look = store.directory.sessions
    monkeypatch.setattr(store.directory, "sessions", lambda tenant: looks.append(tenant) or look(tenant))
    for turn in range(300):
        store.save(ALICE, f"session-{turn % 280}", [1], random_slab(64))
        assert len(files_of(tmp_path)) <= 256
    assert len(looks) < 14 and len(names(store)) > 250


@pytest.mark.parametrize("with_directory", [True, False])
def test_a_tenant_that_floods_the_store_pushes_out_its_own(tmp_path, with_directory):
    store = open_store(tmp_path if with_directory else None, host_bytes=1 << 20, max_sessions=4)
    store.save(ALICE, "old", [1], random_slab())
    for turn in range(10):
        store.save(BOB, f"flood-{turn}", [1], random_slab())
        time.sleep(0.01)
    assert names(store) == {"old"} and names(store, BOB) == {"flood-7", "flood-8", "flood-9"}


def test_host_memory_is_bounded_and_what_leaves_is_zeroed(tmp_path):
    store = open_store(tmp_path, host_bytes=7000)
    buffers = {}
    for name in "abc":
        store.save(ALICE, name, [1], random_slab())
        buffers[name] = store._host._copies[ALICE, name].slabs[0]
        store.restore(ALICE, "a")
    assert set(store._host._copies) == {(ALICE, "a"), (ALICE, "c")}
    assert not buffers["b"].any() and torch.equal(buffers["a"], random_slab())
    store.save(ALICE, "a", [1], random_slab(7001))
    assert not buffers["a"].any() and torch.equal(store.restore(ALICE, "a").slab, random_slab(7001))


@pytest.mark.parametrize("with_directory", [True, False])
@pytest.mark.parametrize("sweep", [True, False])
def test_expired_sessions_are_gone(tmp_path, monkeypatch, with_directory, sweep):
    store = open_store(tmp_path if with_directory else None, host_bytes=9000, max_age_s=60)
    created = store.save(ALICE, "chat", [1], random_slab()).created_ns
    buffer = store._host._copies[ALICE, "chat"].slabs[0]
    monkeypatch.setattr(time, "time_ns", lambda: created + 59 * 10**9)
    assert store.restore(ALICE, "chat") is not None
    monkeypatch.setattr(time, "time_ns", lambda: created + 61 * 10**9)
    assert store.list(ALICE) == []
    if sweep:
        store.sweep()
    else:
        assert refused(store.restore, ALICE, "chat").reason == "expired"
    assert store.peek(ALICE, "chat") is None and files_of(tmp_path) == [] and not buffer.any()


@pytest.mark.parametrize("with_directory", [True, False])
def test_an_idle_store_lets_go_of_expired_sessions(tmp_path, monkeypatch, with_directory):
    monkeypatch.setattr(sessionsweep, "EVERY_S", 0.02)
    store = open_store(tmp_path if with_directory else None, host_bytes=9000, max_age_s=60)
    created = store.save(ALICE, "chat", [1], random_slab()).created_ns
    buffer = store._host._copies[ALICE, "chat"].slabs[0]
    for _ in range(2):
        store.sweeper.start()
    monkeypatch.setattr(time, "time_ns", lambda: created + 61 * 10**9)
    for _ in range(250):
        if not files_of(tmp_path) and not buffer.any():
            break
        time.sleep(0.02)
    store.sweeper.stop()
    assert files_of(tmp_path) == [] and not buffer.any() and store._host.headers() == {}
    assert all(thread.name != "deltamem-sweep" for thread in threading.enumerate())
    store.save(ALICE, "chat", [1], random_slab())
    store.sweeper.start()
    store.sweeper.stop()


def test_erased_means_no_byte_is_left(tmp_path, key_env):
    marker = b"a memory that nobody may find again "
    slab = torch.frombuffer(bytearray(marker * 5000), dtype=torch.uint8)
    store = open_store(tmp_path / "store", key_env, host_bytes=1 << 20)
    for turn in range(2, 5):
        store.save(ALICE, "chat", [1] * turn, slab, earlier=(1, slab))
    path = only_file(tmp_path / "store")
    abandoned = path.with_name(f"{path.name[:32]}-{'0' * 16}.tmp")
    shutil.copy(path, abandoned)
    inodes = [tmp_path / "file", tmp_path / "abandoned"]
    os.link(path, inodes[0])
    os.link(abandoned, inodes[1])
    buffers = store._host._copies[ALICE, "chat"].slabs
    assert store.erase(ALICE, "chat") and not store.erase(ALICE, "chat")
    assert files_of(tmp_path / "store") == [] and len(buffers) == 2 and not any(buffer.any() for buffer in buffers)
    for inode in inodes:  # a second link to what was unlinked: the blocks themselves
        raw = inode.read_bytes()
        assert marker not in raw and b"__metadata__" not in raw and not any(raw[:4096])
    assert store.restore(ALICE, "chat") is None and store.list(ALICE) == []


def test_superseded_evicted_and_expired_files_are_overwritten_too(tmp_path, monkeypatch):
    store = open_store(tmp_path / "store", max_sessions=1, max_age_s=60)

    def save(name, link):
        created = store.save(ALICE, name, [1], torch.full((3000,), 0x5A, dtype=torch.uint8)).created_ns
        os.link(only_file(tmp_path / "store"), tmp_path / link)
        return created

    save("chat", "superseded")
    time.sleep(0.01)
    save("chat", "evicted")
    time.sleep(0.01)
    created = save("other", "expired")
    monkeypatch.setattr(time, "time_ns", lambda: created + 61 * 10**9)
    store.sweep()
    for link in ("superseded", "evicted", "expired"):
        raw = (tmp_path / link).read_bytes()
        assert len(raw) > 3000 and not any(raw)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host_bytes": -1}, "host_bytes"),
        ({"host_bytes": True}, "host_bytes"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"max_sessions": 1.5}, "max_sessions"),
        ({"max_bytes": "1G"}, "max_bytes"),
        ({"max_age_s": 0}, "max_age_s"),
        ({"max_age_s": float("nan")}, "max_age_s"),
        ({"directory": ""}, "directory"),
        ({"directory": 3}, "directory"),
        ({"host_bytes": 0}, "kept nowhere"),
        ({"directory": "d", "key_file": "k", "key_env": "K"}, "one key"),
        ({"key_env": "K"}, "encrypts a directory"),
        ({"key": KEY}, "Unknown deltamem setting 'sessions.key'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SessionSettings.from_dict(settings)


def test_host_memory_has_room_for_large_memories():
    assert [SessionSettings.from_dict({}, n).host_bytes for n in (1 << 20, 3 << 30)] == [1 << 30, 12 << 30]
    assert SessionSettings.from_dict({"host_bytes": 5}, 5).host_bytes == 5
    assert SessionSettings.from_dict({"directory": "d", "host_bytes": 5}, 6).host_bytes == 5


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(KEY + "\n")
    (tmp_path / "short").write_text("secret!")
    monkeypatch.setenv("GOOD", KEY)
    monkeypatch.delenv("MISSING", raising=False)
    assert SessionSettings(directory="d", key_file=str(tmp_path / "key")).key() == bytes.fromhex(KEY)
    assert SessionSettings(directory="d", key_env="GOOD").key() == bytes.fromhex(KEY)
    assert SessionSettings(directory="d").key() is None
    for bad in ({"key_file": str(tmp_path / "short")}, {"key_file": str(tmp_path)}, {"key_env": "MISSING"}):
        with pytest.raises(ValueError, match="64 hex digits") as caught:
            SessionSettings(directory="d", **bad).key()
        assert "secret" not in str(caught.value)


def test_a_key_without_the_cryptography_package(tmp_path, monkeypatch):
    monkeypatch.setenv("K", KEY)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ValueError, match="needs cryptography"):
        open_store(tmp_path, "K")
    open_store(tmp_path).save(ALICE, "chat", [1], random_slab())


def test_bad_directories_and_fingerprints(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot use the directory"):
        open_store(tmp_path / "file")
    for text in ("", "[]", json.dumps({"salt": "xyz", "key_id": None})):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            open_store(tmp_path)
    with pytest.raises(ValueError, match="model"):
        replace(FINGERPRINT, model="")
    with pytest.raises(ValueError, match="tp_rank"):
        replace(FINGERPRINT, tp_rank=1)
