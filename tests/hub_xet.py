"""Xet's content-addressed storage for tests/hub_server.py (https://huggingface.co/docs/xet).

In: xorbs (compressed chunks of files) and shards (which chunks make which file), as hf_xet uploads
them. Out: the files' bytes, checked against their sha256, and reconstructions for downloading.
"""

import hashlib
import re
import struct
from typing import Any

import pyarrow as pa


class Refused(Exception):
    """An answer that is no success: status, code of X-Error-Code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Xet:
    """Content-addressed storage: xorbs (compressed chunks) and the files that are made of them."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.chunks: dict[str, list[tuple[int, int, bytes]]] = {}  # (begin, end in the xorb, data)
        self.files: dict[str, list[tuple[str, int, int]]] = {}  # [(xorb, first chunk, end)]
        self.hash_of: dict[str, str] = {}  # sha256 -> file

    def add_xorb(self, name: str, body: bytes) -> None:
        """Chunks with headers {version, packed size, scheme, size}; a footer may follow."""
        found, place = [], 0
        while place + 8 <= len(body) and body[place : place + 7] != b"XETBLOB":
            packed = int.from_bytes(body[place + 1 : place + 4], "little")
            size = int.from_bytes(body[place + 5 : place + 8], "little")
            end = place + 8 + packed
            found.append((place, end, _unpacked(body[place + 4], body[place + 8 : end], size)))
            place = end
        self.xorbs[name], self.chunks[name] = body, found

    def add_shard(self, body: bytes) -> None:
        """The files that a shard describes; Refused when their bytes do not have their sha256."""
        place = 48
        while (name := body[place : place + 32]) != b"\xff" * 32:
            flags, entries = struct.unpack_from("<II", body, place + 32)
            terms = []
            for i in range(1, entries + 1):
                at = place + 48 * i
                first, end = struct.unpack_from("<II", body, at + 40)
                terms.append((_hex(body[at : at + 32]), first, end))
            place += 48 * (entries + 1) + 48 * entries * (flags >> 31)
            data = self.join(terms)
            if flags >> 30 & 1:
                if _hex(body[place : place + 32]) != hashlib.sha256(data).hexdigest():
                    raise Refused(400, "BadRequest", "sha256 of a file does not fit its chunks")
                place += 48
            self.files[_hex(name)] = terms
            self.hash_of[hashlib.sha256(data).hexdigest()] = _hex(name)

    def join(self, terms: list[tuple[str, int, int]]) -> bytes:
        if lost := [xorb for xorb, _, _ in terms if xorb not in self.xorbs]:
            raise Refused(400, "BadRequest", f"no xorb {lost[0]}")
        return b"".join(
            data for xorb, first, end in terms for _, _, data in self.chunks[xorb][first:end]
        )

    def reconstruction(self, name: str, wanted: str | None, url: str) -> dict[str, Any]:
        if name not in self.files:
            raise Refused(404, "NotFound", "no such file")
        terms = self.files[name]
        begin, last = byte_range(wanted, len(self.join(terms)))
        shown, fetch, place, skip = [], {}, 0, None
        for xorb, first, end in terms:
            chunks = self.chunks[xorb][first:end]
            size = sum(len(data) for _, _, data in chunks)
            if place + size > begin and place <= last:
                skip = begin - place if skip is None else skip
                span = {"start": first, "end": end}
                shown.append({"hash": xorb, "unpacked_length": size, "range": span})
                piece = {"start": chunks[0][0], "end": chunks[-1][1] - 1}
                entry = {"range": span, "url": f"{url}/cdn/xorb/{xorb}", "url_range": piece}
                fetch.setdefault(xorb, []).append(entry)
            place += size
        return {"offset_into_first_range": skip or 0, "terms": shown, "fetch_info": fetch}


def _unpacked(scheme: int, data: bytes, size: int) -> bytes:
    if scheme:
        data = pa.Codec("lz4").decompress(data, size, asbytes=True)
    if scheme == 2:  # the bytes of each 4-byte word lie in 4 groups
        whole, groups, place = bytearray(size), [], 0
        for k in range(4):
            groups.append(data[place : place + (size - k + 3) // 4])
            place += len(groups[-1])
            whole[k::4] = groups[-1]
        data = bytes(whole)
    assert len(data) == size
    return data


def _hex(hash: bytes) -> str:
    """As Xet writes hashes: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))


def byte_range(header: str | None, size: int) -> tuple[int, int]:
    """First and last byte that a Range header asks for."""
    if not header:
        return 0, size - 1
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", header).groups()
    if not first:
        first, last = str(size - int(last)), ""
    if int(first) >= size:
        raise Refused(416, "", "range not satisfiable")
    return int(first), min(int(last or size - 1), size - 1)
