"""One session in one file: the format and its checks.

The file is safetensors: an 8-byte length, a JSON header, then the tensors `tokens`, `slab` and, if the session has an
earlier memory, `earlier`. The header's `__metadata__` says what it is: format, version, tenant (keyed hash), name,
save_id, created_ns, n_tokens, n_earlier, n_bytes, parts and fingerprint. There are two kinds:

* clear: `tokens` is I32 [n_tokens], the slabs are U8 [n_bytes], and any safetensors reader opens them. SHA-256 of
  each tensor and of the header find damage; they cannot find a forger, who would compute them anew.
* sealed (see seal.py): name, tokens and slabs are encrypted in pieces of at most 1 MiB, each followed by its
  tag and bound to the whole header. The name is padded. Sizes, times and fingerprint stay readable.

Nothing in a file is used before it is checked, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import BinaryIO

import torch

from vllm_deltamem.seal import PIECE, TAG, Cipher, Seal
from vllm_deltamem.sessionname import NAME_LIMIT

FORMAT = "deltamem-session"
VERSION = "4"
HEADER_LIMIT = 64 << 10  # bytes; a longer header is not one of ours
NAME, TOKENS, SLAB, EARLIER = range(4)  # sections of a sealed file
TENSORS = {TOKENS: "tokens", SLAB: "slab", EARLIER: "earlier"}


class SessionRefused(ValueError):
    """A session that must not be used, or could not be saved.

    reason goes into the response: foreign, version, truncated, altered, key, fingerprint, expired, incomplete,
    replaced, erased, other pins, size, unreadable or unwritable. The message is for people.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Fingerprint:
    """Everything that must be equal for a slab to mean the same; strings have at most 256 characters.

    Raises ValueError for an empty or overlong string, or a rank outside the tensor-parallel group.
    """

    model: str  # weights and revision
    profile: str
    settings: str  # of the memory, not of the store
    state: str  # version of what the bytes of a slot mean, see kernels.slot.STATE
    dtype: str
    vllm: str  # version
    tp_size: int = 1
    tp_rank: int = 0

    def __post_init__(self):
        for key in ("model", "profile", "settings", "state", "dtype", "vllm"):
            value = getattr(self, key)
            if not isinstance(value, str) or not 1 <= len(value) <= 256:
                raise ValueError(f"fingerprint: {key} must be a string of 1 to 256 characters, got {value!r}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"fingerprint: tp_rank {self.tp_rank} is not a rank of tp_size {self.tp_size}")

    def difference(self, other: Fingerprint) -> str:
        """The fields that differ, as 'dtype is bfloat16 here, float16 in the session'; empty if none does."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return "; ".join(f"{k} is {ours} here, {theirs} in the session" for k, (ours, theirs) in pairs.items()
                         if ours != theirs)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What is known of a session without its tokens and slabs."""

    tenant: str  # keyed hash, as in the name of its folder
    name: str
    save_id: str  # 32 hex digits, the same for all ranks of one save
    created_ns: int  # since the epoch
    n_tokens: int
    n_earlier: int  # tokens that the earlier memory has read, 0 if there is none
    n_bytes: int  # of a slab of one rank
    parts: int  # of slots that the slab is, in the order of their tokens; 0: a whole slot
    fingerprint: Fingerprint

    def __post_init__(self):
        if self.n_tokens < 1 or self.n_bytes < 1:
            raise ValueError(f"a session needs tokens and bytes, got {self.n_tokens} and {self.n_bytes}")
        if not 0 <= self.n_earlier < self.n_tokens:
            raise ValueError(f"an earlier memory of {self.n_earlier} tokens in a session of {self.n_tokens}")
        if self.parts < 0 or self.parts and self.n_bytes % self.parts:
            raise ValueError(f"{self.n_bytes} bytes in {self.parts} parts")

    @property
    def rank_bytes(self) -> int:
        """Of all slabs of one rank."""
        return self.n_bytes * (2 if self.n_earlier else 1)


def write_session(
    file: BinaryIO, header: Header, tokens: torch.Tensor, slabs: list[torch.Tensor], seal: Seal | None
) -> None:
    """Write a session to an empty file; syncing and publishing it is left to the caller.

    tokens int32 [n_tokens]; slabs uint8 [n_bytes], the earlier one last; all contiguous and on the CPU.
    """
    meta = {key: str(value) for key, value in asdict(header).items() if key not in ("name", "fingerprint")}
    meta["fingerprint"] = _json(asdict(header.fingerprint)).decode()
    meta |= {"format": FORMAT, "version": VERSION}
    contents = {section: _bytes_of(x) for section, x in zip(_sections(header), [tokens, *slabs], strict=True)}
    if seal is None:
        meta |= {"name": header.name}
        meta |= {f"{TENSORS[section]}_sha256": _sha256(data) for section, data in contents.items()}
        _write_header(file, header, meta | {"sha256": _sha256(_json(meta))}, sealed=False)
        for data in contents.values():
            for _, piece in _pieces(data):
                file.write(piece)
        return
    salt = secrets.token_bytes(32)
    cipher = seal.cipher(header.tenant, salt)
    meta |= {"key_id": seal.key_id, "salt": salt.hex()}
    bound = _json(meta)
    name = header.name.ljust(NAME_LIMIT).encode()
    sealed_name = b"".join(_sealed(cipher, NAME, memoryview(name), bound))
    _write_header(file, header, meta | {"name": sealed_name.hex()}, sealed=True)
    for section, data in contents.items():
        for piece in _sealed(cipher, section, data, bound + name):
            file.write(piece)


class SessionFile:
    """An open session file whose header was checked: a context manager.

    Raises SessionRefused for whatever is not a whole session of this tenant under this key, and OSError where
    the disk fails.
    """

    def __init__(self, path: str, tenant: str, seal: Seal | None):
        self._file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
        try:
            self._meta, table = self._read_header()
            self.header = self._open(seal)
            if self.header.tenant != tenant:
                raise SessionRefused("altered", "the session file belongs to another tenant")
            if table != _table(self.header, self._cipher is not None):
                raise SessionRefused("altered", "the header of the session file was altered")
            self._offsets = {section: table[TENSORS[section]]["data_offsets"] for section in _sections(self.header)}
            self._check_size()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SessionFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def tokens(self) -> torch.Tensor:
        """The token ids, int32 [n_tokens]."""
        out = torch.empty(self.header.n_tokens, dtype=torch.int32)
        self._read(TOKENS, out)
        return out

    def slab(self, out: torch.Tensor, earlier: bool = False) -> None:
        """Read the slab, or the earlier one, into out, uint8 [n_bytes]; when it is refused, out holds zeros."""
        try:
            self._read(EARLIER if earlier else SLAB, out)
        except BaseException:
            out.zero_()
            raise

    def _read_header(self) -> tuple[dict[str, str], dict]:
        """The metadata and the table of tensors, neither of them checked."""
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        self._data = 8 + length
        raw = self._file.read(length) if length <= HEADER_LIMIT else b""
        if len(prefix) < 8 or length <= HEADER_LIMIT and len(raw) < length:
            raise SessionRefused("truncated", "the session file ends inside its header")
        try:
            table = json.loads(raw)
            meta = table.pop("__metadata__")
            if meta["format"] != FORMAT or not all(isinstance(value, str) for value in meta.values()):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise SessionRefused("foreign", "the file is not a deltamem session") from None
        if meta.get("version") != VERSION:
            message = f"the session has format {meta.get('version')}, this version reads {VERSION}"
            raise SessionRefused("version", message)
        return meta, table

    def _open(self, seal: Seal | None) -> Header:
        """The header, proved by its checksum or its seal; sets the cipher and what it binds."""
        meta = dict(self._meta)
        if meta.get("key_id") != (seal.key_id if seal else None):
            raise SessionRefused("key", "the session was written with another key, or without one")
        self._cipher = None
        try:
            if seal is None:
                name = meta["name"]
                genuine = meta.pop("sha256") == _sha256(_json(meta))
            else:
                self._cipher = seal.cipher(meta["tenant"], bytes.fromhex(meta["salt"]))
                text, padded = meta.pop("name"), bytearray(NAME_LIMIT)
                sealed, bound = bytes.fromhex(text), _json(meta)
                genuine = sealed.hex() == text and len(sealed) == NAME_LIMIT + TAG
                genuine = genuine and self._cipher.open(NAME, 0, sealed, bound, padded)
                self._bound = bound + padded
                name = padded.decode().rstrip()
            if not genuine:
                raise ValueError
            return Header(
                tenant=meta["tenant"], name=name, save_id=meta["save_id"], created_ns=int(meta["created_ns"]),
                n_tokens=int(meta["n_tokens"]), n_earlier=int(meta["n_earlier"]), n_bytes=int(meta["n_bytes"]),
                parts=int(meta["parts"]), fingerprint=Fingerprint(**json.loads(meta["fingerprint"])),
            )  # fmt: skip
        except (ValueError, LookupError, TypeError):
            raise SessionRefused("altered", "the header of the session file was altered") from None

    def _check_size(self) -> None:
        size, end = os.fstat(self._file.fileno()).st_size, self._data + max(self._offsets.values())[1]
        if size != end:
            reason = "truncated" if size < end else "altered"
            raise SessionRefused(reason, f"the session file has {size} bytes instead of {end}")

    def _read(self, section: int, out: torch.Tensor) -> None:
        self._file.seek(self._data + self._offsets[section][0])
        digest = hashlib.sha256()
        sealed = memoryview(bytearray(PIECE + TAG))
        for number, piece in _pieces(_bytes_of(out)):
            if self._cipher is None:
                _fill(self._file, piece)
                digest.update(piece)
                continue
            _fill(self._file, sealed[: len(piece) + TAG])
            if not self._cipher.open(section, number, sealed[: len(piece) + TAG], self._bound, piece):
                raise SessionRefused("altered", "the session file was altered")
        if self._cipher is None and digest.hexdigest() != self._meta[f"{TENSORS[section]}_sha256"]:
            raise SessionRefused("altered", "the session file was altered")


def _table(header: Header, sealed: bool) -> dict[str, dict]:
    """The safetensors entries of the tensors, which the header determines."""
    table, end = {}, 0
    for section in _sections(header):
        size = 4 * header.n_tokens if section == TOKENS else header.n_bytes
        if sealed:
            size += TAG * -(-size // PIECE)
        clear = section == TOKENS and not sealed
        kind = {"dtype": "I32", "shape": [header.n_tokens]} if clear else {"dtype": "U8", "shape": [size]}
        table[TENSORS[section]] = kind | {"data_offsets": [end, end + size]}
        end += size
    return table


def _sections(header: Header) -> list[int]:
    return [TOKENS, SLAB, EARLIER] if header.n_earlier else [TOKENS, SLAB]


def _write_header(file: BinaryIO, header: Header, meta: dict[str, str], sealed: bool) -> None:
    raw = _json({"__metadata__": meta} | _table(header, sealed))
    raw += b" " * (-len(raw) % 8)  # safetensors aligns the tensors to 8 bytes
    file.write(len(raw).to_bytes(8, "little") + raw)


def _sealed(cipher: Cipher, section: int, data: memoryview, bound: bytes) -> Iterator[memoryview]:
    """The encrypted pieces of data; each view is valid until the next one is asked for."""
    buffer = memoryview(bytearray(PIECE + TAG))
    for number, piece in _pieces(data):
        out = buffer[: len(piece) + TAG]
        cipher.seal(section, number, piece, bound, out)
        yield out


def _fill(file: io.FileIO, view: memoryview) -> None:
    """Read until the view is full."""
    while len(view):
        count = file.readinto(view)
        if not count:
            raise SessionRefused("truncated", "the session file ends too early")
        view = view[count:]


def _pieces(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    return enumerate(data[start : start + PIECE] for start in range(0, len(data), PIECE))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: dict) -> bytes:
    """Canonical: equal values give equal bytes, to be hashed and bound."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
