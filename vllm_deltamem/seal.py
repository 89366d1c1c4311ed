"""Encryption of session files at rest: AES-256-GCM under keys derived from one master key.

The key of a file is HKDF-SHA256(master key, random salt of the file, its tenant): every tenant and every file
has its own, and once the salt is wiped, the rest of the file is unreadable even with the master key.
"""

from __future__ import annotations

from vllm_deltamem.sessionsettings import SessionSettings

PIECE = 1 << 20  # bytes encrypted at once: AES-GCM allows 2 GiB, the processor's cache likes 1 MiB
TAG = 16  # bytes that AES-GCM adds to a piece


class Seal:
    """The master key of a store, 32 bytes. Raises ValueError for another length or without `cryptography`."""

    def __init__(self, master: bytes):
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            message = "sessions: a key needs cryptography (pip install 'vllm-deltamem[sessions]')"
            raise ValueError(message) from None
        if len(master) != 32:
            raise ValueError(f"sessions: the key must have 32 bytes, got {len(master)}")
        self._master = master
        self._aes = AESGCM
        self.key_id = self.derive("key id", 8).hex()

    @classmethod
    def of(cls, settings: SessionSettings) -> Seal | None:
        """Under the key of these settings; None if they name none. Raises ValueError as SessionSettings.key does."""
        key = settings.key()
        return cls(key) if key else None

    def derive(self, purpose: str, length: int, salt: bytes = b"") -> bytes:
        """HKDF-SHA256 (RFC 5869) of the master key: `length` bytes for one purpose and salt."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), length, salt, f"deltamem sessions: {purpose}".encode()).derive(self._master)

    def cipher(self, tenant: str, salt: bytes) -> Cipher:
        """The cipher of the one file that carries this salt."""
        material = self.derive(f"file of {tenant}", 32 + 7, salt)
        return Cipher(self._aes(material[:32]), material[32:])


class Cipher:
    """Seals and opens the pieces of one file.

    The nonce is 7 bytes derived from the file's salt, the section (0 to 255) and the number of the piece (32
    bits), so no two pieces under one key share one. `bound` is authenticated with the piece but not stored.
    """

    def __init__(self, gcm, nonce: bytes):
        self._gcm = gcm
        self._nonce = nonce

    def seal(self, section: int, number: int, piece: memoryview, bound: bytes, out: memoryview) -> None:
        """Encrypt a piece into out, which is TAG bytes longer."""
        self._gcm.encrypt_into(self._nonce_of(section, number), piece, bound, out)

    def open(self, section: int, number: int, sealed: memoryview, bound: bytes, out: memoryview) -> bool:
        """Decrypt into out, TAG bytes shorter; False where this is not what was sealed under this key."""
        from cryptography.exceptions import InvalidTag

        try:
            self._gcm.decrypt_into(self._nonce_of(section, number), sealed, bound, out)
        except InvalidTag:
            return False
        return True

    def _nonce_of(self, section: int, number: int) -> bytes:
        return self._nonce + bytes([section]) + number.to_bytes(4, "big")
