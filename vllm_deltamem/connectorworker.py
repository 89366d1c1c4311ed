"""The connector in a worker: what it does to slots before and after the forward pass of a step.

A session is restored before its first new token is computed: no token is ever computed on what turns out to be
unreadable. Sessions are read and written beside the steps (carrier.py), from copies of slots in host memory.
"""

from collections import Counter

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from vllm_deltamem.blocks import Moves
from vllm_deltamem.carrier import Carrier, Copied, Read, Write
from vllm_deltamem.pool import SlotPool
from vllm_deltamem.sessions import SessionRefused, SessionStore
from vllm_deltamem.transfers import Report, StepMetadata, Transfer, clip

logger = init_logger(__name__)

PAUSE_S = 0.005  # of a step in which there is nothing to do but to wait


class ConnectorWorker:
    """The side of one worker, whose part of the sessions the store holds."""

    def __init__(self, store: SessionStore):
        self._store, self.carrier = store, Carrier(store, store.settings.host_bytes)
        store.sweeper.start()
        self._earlier: dict[str, Copied] = {}  # memories from before the answer's first merge, by request
        self._copied: set[str] = set()  # requests whose slot was copied since the last results
        self._restored: set[str] = set()  # likewise those whose session was restored, or refused
        self._report = Report({}, Counter())  # being put together
        self._moves = Moves({}, {})  # of the step under way

    def start(self) -> None:
        """What the slots compile should not keep the first request waiting."""
        SlotPool.serving()

    def shutdown(self) -> None:
        self.carrier.shutdown()

    def begin_step(self, step: StepMetadata) -> None:
        """Before every forward pass; loads may start after it."""
        self._moves = step.moves
        for transfer in step.saves:  # no merge is due but those of this step, whose tokens are to come
            self._copy(transfer)
            self._copied.add(transfer.request_id)
        pool = SlotPool.serving()
        if pool is not None:
            for target, slot in step.copies.items():
                pool.copy(slot, target)
            pool.kinds = step.kinds
            if step.branches:
                pool.branch(step.branches)
            pool.pin(step.pins)
            for request_id, slot in step.kept.items():
                self._earlier[request_id] = self.carrier.copy(pool.memory(slot))
        for turn in step.begun:
            self._store.begin(turn.tenant, turn.name, turn.save_id)

    def restore(self, step: StepMetadata) -> None:
        """Begin to read what the step restores."""
        pool = SlotPool.serving()
        for transfer in step.restores:
            self.carrier.read(transfer, pool.memory(transfer.slot))

    def end_step(self, step: StepMetadata) -> None:
        """Merge what is due, move what is in the way, and note what has been read and written."""
        pool = SlotPool.serving()
        if pool is not None:
            self._settle(pool)
            pool.branches, pool.pins, pool.kinds = [], {}, (True, True)  # a dummy run has none, and no connector
        for turn in step.ended:
            self._store.end(turn.tenant, turn.name, turn.save_id)
        if step.waiting:
            self.carrier.pause(PAUSE_S)
        for read in self.carrier.arrived():
            self._place(read)
        self._report.written.update(write.transfer.turn.save_id for write in self.carrier.written())

    def save(self, transfer: Transfer) -> None:
        """Save a slot between two steps, or, as vLLM has it with structured output, once a forward pass is through.

        The step may be under way whose last token this save counts, and whose moves it knows.
        """
        self._settle(SlotPool.serving())
        self._copy(transfer)

    def results(self, finished: set[str]) -> KVConnectorTransferResults:
        """Requests whose slots are copied or restored. finished: requests that need nothing any more."""
        for request_id in finished:
            self._earlier.pop(request_id, None)
        results = KVConnectorTransferResults(self._copied, self._restored, set(self._report.refused))
        self._copied, self._restored = set(), set()
        return results

    def report(self) -> Report | None:
        """What came of sessions since the last report."""
        report, self._report = self._report, Report({}, Counter())
        return report if report.refused or report.written else None

    def _settle(self, pool: SlotPool) -> None:
        """Do what is left to do after a forward pass, once."""
        pool.merge_due()
        moves, self._moves = self._moves, Moves({}, {})
        pool.move(moves)

    def _copy(self, transfer: Transfer) -> None:
        """Copy a slot, to be written."""
        kept = self._earlier.pop(transfer.request_id, None)
        slot = kept if transfer.from_kept else self.carrier.copy(SlotPool.serving().memory(transfer.slot))
        self.carrier.write(Write(transfer, slot, kept if transfer.n_earlier else None))

    def _place(self, read: Read) -> None:
        """Have a slot hold what was read, and report it."""
        transfer, pool = read.transfer, SlotPool.serving()
        pool.forget(transfer.slot)
        try:
            read.place()
            if transfer.slot.whole:  # in parts all tokens are as they are
                written, asked = (clip(x, transfer.reach.length) for x in (pool.pins_of(transfer.slot), transfer.pins))
                if written != asked:
                    raise SessionRefused("other pins", f"session {transfer.turn.name} was read with other pins")
        except SessionRefused as refused:
            logger.warning("deltamem computes a prompt anew: %s", refused)
            self._report.refused[transfer.request_id] = refused.reason
        self._restored.add(transfer.request_id)
