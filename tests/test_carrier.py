"""What is written and read beside the steps: in order, bounded, zeroed afterwards, and never lost."""

import threading
from dataclasses import replace

import pytest
import torch
from engines import gated
from test_pool import make_pool
from test_sessions import ALICE, FINGERPRINT, open_store, random_slab, refused

from vllm_deltamem import carrier as carriers
from vllm_deltamem.blocks import Moves, Slot
from vllm_deltamem.carrier import Carrier, Copied, Read, Write
from vllm_deltamem.connectorworker import ConnectorWorker
from vllm_deltamem.pool import SlotPool
from vllm_deltamem.sessions import SessionRefused
from vllm_deltamem.transfers import Reach, StepMetadata, Transfer, Turn

N_BYTES = 3000
SLOT = Slot(True, (1,))


@pytest.fixture(params=[True, False], ids=["directory", "host"])
def store(request, tmp_path):
    return open_store(tmp_path if request.param else None, host_bytes=1 << 20)


@pytest.fixture
def carrier(store):
    made = Carrier(store, most_bytes=2 * N_BYTES)
    yield made
    made.shutdown()


@pytest.fixture
def gate():
    """Writing waits until it is set."""
    with gated(Write) as gate:
        yield gate


def turn(store, name="chat"):
    return Turn(ALICE, name, store.begin(ALICE, name))


def write_of(turn, seed=0, tokens=(1, 2), earlier=None):
    kept = None if earlier is None else Copied.of([random_slab(N_BYTES, earlier)])
    transfer = Transfer(f"request-{seed}", SLOT, turn, list(tokens), 0 if kept is None else 1)
    return Write(transfer, Copied.of([random_slab(N_BYTES, seed)]), kept)


def restore_of(turn, earlier=False):
    return Transfer("reader", SLOT, turn, reach=Reach(1, earlier, 0))


def done(poll):
    """The one thing that poll() reports, sooner or later."""
    while not (found := poll()):
        pass
    (found,) = found
    return found


@pytest.mark.parametrize("earlier", [None, 7], ids=["last", "and earlier"])
def test_what_is_written_is_read_again(store, carrier, earlier):
    begun = turn(store)
    row = random_slab(N_BYTES)
    write = write_of(begun, earlier=earlier)
    carrier.write(write)
    carrier.finish()
    assert carrier.written() == [write] and carrier.written() == []
    assert not write.slot.buffer.any(), "the copy is zeroed"
    assert earlier is None or not write.earlier.buffer.any()
    for asked, seed in [(False, 0)] + ([] if earlier is None else [(True, earlier)]):
        row = torch.full((N_BYTES,), 9, dtype=torch.uint8)
        carrier.read(restore_of(begun, asked), [row])
        done(carrier.arrived).place()
        assert torch.equal(row, random_slab(N_BYTES, seed))


def test_the_slot_may_change_once_it_is_copied(store, carrier, gate):
    begun, row = turn(store), random_slab(N_BYTES)
    carrier.write(Write(Transfer("request", SLOT, begun, [1]), Copied.of([row]), None))
    row.zero_()
    assert carrier.written() == []
    gate.set()
    done(carrier.written)
    assert torch.equal(store.restore(ALICE, "chat").slab, random_slab(N_BYTES))


@pytest.mark.parametrize("written", [True, False], ids=["written", "waiting"])
@pytest.mark.parametrize("asked", [1, 3])
def test_of_parts_the_first_are_read_that_are_asked_for(store, carrier, gate, written, asked):
    begun, parts = turn(store), random_slab(N_BYTES).view(5, -1)
    transfer = Transfer("request", Slot(False, (4, 0, 2)), begun, [1, 2])
    carrier.write(Write(transfer, carrier.copy([parts[4], parts[0], parts[2]]), None))
    if written:
        gate.set()
        carrier.finish()
        header = store.peek(ALICE, "chat").header
        assert (header.parts, header.n_bytes) == (3, 3 * N_BYTES // 5)
    rows = [torch.zeros(N_BYTES // 5, dtype=torch.uint8) for _ in range(asked)]
    carrier.read(Transfer("reader", Slot(False, (*range(asked),)), begun, reach=Reach(1, False, 3)), rows)
    read = done(carrier.arrived)
    assert not any(row.any() for row in rows), "not before it is placed"
    read.place()
    gate.set()
    for row, part in zip(rows, (4, 0, 2), strict=False):
        assert torch.equal(row, parts[part])


def test_copies_are_made_where_earlier_ones_were(store, carrier):
    places = set()
    for i in range(6):
        write = write_of(turn(store, f"chat-{i}"), i)
        write.slot = carrier.copy([random_slab(N_BYTES, i)])
        carrier.write(write)
        carrier.finish()
        carrier.written()
        places.add(write.slot.buffer.data_ptr())
    assert len(places) == 1
    smaller, other = carrier.copy([random_slab(10)]), carrier.copy([random_slab(20)])
    assert smaller.buffer.data_ptr() in places and len(smaller.wait()) == 10 and len(other.buffer) == 20
    for i in range(6):
        assert torch.equal(store.restore(ALICE, f"chat-{i}").slab, random_slab(N_BYTES, i))


def test_writes_wait_where_too_much_waits(store, carrier, gate):
    turns = [turn(store, f"chat-{i}") for i in range(4)]
    for i in range(2):
        carrier.write(write_of(turns[i], i))
    third = threading.Thread(target=carrier.write, args=(write_of(turns[2], 2),))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.set()
    third.join()
    carrier.write(write_of(turns[3], 3))
    carrier.finish()
    assert [write.transfer.turn for write in carrier.written()] == turns
    for i in range(4):
        assert torch.equal(store.restore(ALICE, f"chat-{i}").slab, random_slab(N_BYTES, i))


def test_one_that_is_larger_than_may_wait_is_written_even_so(store):
    carrier = Carrier(store, most_bytes=1)
    carrier.write(write_of(turn(store)))
    carrier.shutdown()
    assert torch.equal(store.restore(ALICE, "chat").slab, random_slab(N_BYTES))


def test_shutdown_writes_what_is_left(store, carrier, gate):
    for i in range(2):
        carrier.write(write_of(turn(store, f"chat-{i}"), i))
    threading.Timer(0.1, gate.set).start()
    carrier.shutdown()
    assert {header.name for header in store.list(ALICE)} == {"chat-0", "chat-1"}


def test_an_erasure_is_final_for_what_waits(store, carrier, gate):
    begun = turn(store)
    write = write_of(begun)
    carrier.write(write)
    assert store.erase(ALICE, "chat")
    gate.set()
    assert done(carrier.written) is write and not write.slot.buffer.any()
    assert store.peek(ALICE, "chat") is None and store._host._begun == {}
    row = torch.full((N_BYTES,), 9, dtype=torch.uint8)
    carrier.read(restore_of(begun), [row])
    assert refused(done(carrier.arrived).place).reason == "erased"
    assert (row == 9).all(), "nothing was put into the slot"


@pytest.mark.parametrize("earlier", [False, True])
def test_what_waits_to_be_written_can_be_read(store, carrier, gate, earlier):
    begun, row = turn(store), torch.empty(N_BYTES, dtype=torch.uint8)
    carrier.write(write_of(begun, earlier=7))
    carrier.read(restore_of(begun, earlier), [row])
    done(carrier.arrived).place()
    assert torch.equal(row, random_slab(N_BYTES, 7 if earlier else 0)) and not gate.is_set()
    gate.set()
    carrier.finish()
    assert torch.equal(store.restore(ALICE, "chat", earlier=earlier).slab, row)


def test_what_waits_and_was_erased_cannot_be_read(store, carrier, gate):
    begun, row = turn(store), torch.empty(N_BYTES, dtype=torch.uint8)
    carrier.write(write_of(begun))
    assert store.erase(ALICE, "chat")
    carrier.read(restore_of(begun), [row])
    assert refused(done(carrier.arrived).place).reason == "erased"


def test_what_is_written_before_it_is_read_comes_from_the_store(store, carrier):
    begun, row = turn(store), torch.empty(N_BYTES, dtype=torch.uint8)
    write = write_of(begun)
    with gated(Write) as writing, gated(Read) as reading:
        carrier.write(write)
        carrier.read(restore_of(begun), [row])
        writing.set()
        carrier.finish()
        reading.set()
        done(carrier.arrived).place()
    assert torch.equal(row, random_slab(N_BYTES)) and not write.slot.buffer.any()


def test_a_rank_reads_its_part_before_others_have_written_theirs(tmp_path):
    stores = [open_store(tmp_path, fingerprint=replace(FINGERPRINT, tp_size=2, tp_rank=rank)) for rank in range(2)]
    begun = Turn(ALICE, "chat", stores[0].begin(ALICE, "chat"))
    carriers = [Carrier(store, most_bytes=N_BYTES) for store in stores]
    rows = [torch.empty(N_BYTES, dtype=torch.uint8) for _ in stores]
    carriers[1].write(write_of(begun, 1))
    carriers[1].finish()
    assert refused(stores[0].peek, ALICE, "chat").reason == "incomplete"
    carriers[1].read(restore_of(begun), [rows[1]])
    done(carriers[1].arrived).place()
    carriers[0].read(restore_of(begun), [rows[0]])
    assert refused(done(carriers[0].arrived).place).reason == "incomplete", "this one has written nothing"
    assert torch.equal(rows[1], random_slab(N_BYTES, 1))
    for carrier in carriers:
        carrier.shutdown()


def test_a_refused_save_leaves_the_one_before_and_nobody_waiting(store, carrier, monkeypatch, caplog):
    store.save(ALICE, "chat", [1], random_slab(N_BYTES, 5))

    def refuse(*_):
        raise SessionRefused("unwritable", "cannot save session chat: No space left on device")

    begun = turn(store)
    store.expect(ALICE, "chat", begun.save_id)
    monkeypatch.setattr(store, "save", refuse)
    with caplog.at_level("WARNING"):
        carrier.write(write_of(begun))
        done(carrier.written)
    assert "No space left" in caplog.text
    assert not store.expects(ALICE, "chat") and store._host._begun == {}
    assert torch.equal(store.restore(ALICE, "chat").slab, random_slab(N_BYTES, 5))


def test_what_goes_wrong_is_raised_where_it_is_asked_for(store, carrier, monkeypatch):
    monkeypatch.setattr(store, "save", lambda *_: 1 / 0)
    carrier.write(write_of(turn(store)))
    with pytest.raises(ZeroDivisionError):
        done(carrier.written)


def test_a_pause_ends_when_something_is_done(carrier, store, gate):
    carrier.pause(0.01)
    carrier.write(write_of(turn(store)))
    threading.Timer(0.1, gate.set).start()
    carrier.pause(30)
    assert len(carrier.written()) == 1


def test_a_slot_on_a_device_is_read_through_host_memory(store, carrier, monkeypatch):
    """The meta device stands for one: it takes copies, and holds nothing."""
    store.save(ALICE, "chat", [1], random_slab(N_BYTES))
    monkeypatch.setattr(carriers, "is_pin_memory_available", lambda: False)
    save_id = store.peek(ALICE, "chat").header.save_id
    carrier.read(restore_of(Turn(ALICE, "chat", save_id)), [torch.empty(N_BYTES, dtype=torch.uint8, device="meta")])
    read = done(carrier.arrived)
    read.place()
    assert torch.equal(read.staged, random_slab(N_BYTES))


def test_a_save_in_the_middle_of_a_step_finds_what_the_step_moves(store, monkeypatch):
    """As vLLM has it with structured output: a step's answers are looked at between the next one's pass and its end."""
    pool, begun = make_pool(parts=2), turn(store)
    monkeypatch.setattr(SlotPool, "serving", lambda: pool)
    worker, left = ConnectorWorker(store), pool.memory(Slot(False, (2, 5)))
    held = random_slab(2 * len(left[0]))
    for row, values in zip(left, held.chunk(2), strict=True):
        row.copy_(values)
    step = StepMetadata(moves=Moves({2: 4}, {}))
    worker.begin_step(step)
    worker.save(Transfer("talker", Slot(False, (4, 5)), begun, [1, 2]))
    pool.memory(Slot(False, (4,)))[0].zero_()  # whoever claims it next
    worker.end_step(step)
    assert not pool.memory(Slot(False, (4,)))[0].any(), "it is moved once"
    worker.shutdown()
    store.sweeper.stop()
    restored = torch.empty_like(held)
    store.restore(begun.tenant, begun.name, begun.save_id, restored)
    assert torch.equal(restored, held)
