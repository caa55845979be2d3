"""A small engine that breaks trace files: bytes, lines, JSON values, CSV fields, msgpack headers, gzip members."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from random import Random

from tests.sim.trace_files import SAMPLES

KB, MB = 2**10, 2**20

HOSTILE_JSON = [
    b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1e308", b"-1", b"-0", b"-0.0", b"0.5", b"1e3", b"9" * 400,
    b"-" + b"9" * 5000, b"9007199254740991", b"9007199254740992", b"9223372036854775807", b"9223372036854775808",
    b"18446744073709551615", b"18446744073709551616", b"-9223372036854775808", b"-4611686018427387905", b"null",
    b"true", b"[]", b"{}", b'""', b'"1"', b'"NaN"', b'"\\ud800"', b'"\xff"', b'"\x00"', b"[null]", b'{"a": 1}', b"0x1f",
    b"01", b"[" * 2000, b"[" * 2000 + b"]" * 2000, b'{"a":' * 2000, b"[1" + b",1" * 5000 + b"]", b"",
    b'"' + b"x" * 5000 + b'"',
]  # fmt: skip
HOSTILE_MSGPACK = [
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1",
    b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\x91" * 3000, b"\x81" * 3000, b"\xcb\x7f\xf8" + b"\x00" * 6,
    b"\xcb\x7f\xf0" + b"\x00" * 6, b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7, b"\xc0", b"\xc3", b"\x80", b"\x90",
    b"\xa0", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd9\x02\xff\xff", b"\x81\x90\x01",
    b"\x81\x80\x01", b"\x82\x01\x01\x01\x02", b"\xc4\x00", b"\x00\x00\x00\x00", b"\x00\xff\xff\xff",
]  # fmt: skip
HOSTILE_FIELDS = [
    b"nan", b"inf", b"-inf", b"1e400", b"-1", b"9" * 400, b"9" * 5000, b"", b" ", b'"', b'""', b"1_0", b"0x10", b"1.5",
    b"0001-01-01", b"9999-12-31T23:59:59.999999", b"2023-02-30", b"2023-11-16 25:00:00", b"2023-11-16+99:99",
    b"0001-01-01T00:00:00+14:00", b"\xff", b"\x00", "١٢".encode(), b"," * 50, b"x" * 5000,
]  # fmt: skip

# A value of a JSON object, roughly: what stands between a colon or a comma and what ends it.
_VALUE = re.compile(rb'(?<=[:\[,])\s*("[^"\n]*"|\[[^\[\]\n]*\]|[-+.\w]+)(?=\s*[,\]}])')
_PAIR = re.compile(rb'"[a-z_]+": ?("[^"\n]*"|\[[^\[\]\n]*\]|[-+.\w]+)')
_FIELD = re.compile(rb"[^,\r\n]+")

Mutation = Callable[[Random, bytes], bytes]


def _cut(random: Random, data: bytes) -> tuple[int, int]:
    first = random.randrange(len(data) + 1)
    return first, min(len(data), first + random.choice((1, 2, 5, 20, 200)))


def truncate(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        if changed:
            changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def drop(random: Random, data: bytes) -> bytes:
    first, last = _cut(random, data)
    return data[:first] + data[last:]


def repeat(random: Random, data: bytes) -> bytes:
    first, last = _cut(random, data)
    return data[:first] + data[first:last] * random.choice((2, 3, 50)) + data[last:]


def insert_noise(random: Random, data: bytes) -> bytes:
    first, _ = _cut(random, data)
    return data[:first] + random.randbytes(random.choice((1, 4, 64))) + data[first:]


def splice(random: Random, data: bytes) -> bytes:
    other = any_sample(random)
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def shuffle_lines(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    random.shuffle(lines)
    return b"\n".join(lines)


def repeat_lines(random: Random, data: bytes) -> bytes:
    return data * random.choice((2, 20))


def _replace(pattern: re.Pattern[bytes], values: list[bytes]) -> Mutation:
    def mutation(random: Random, data: bytes) -> bytes:
        places = list(pattern.finditer(data))
        if not places:
            return data + random.choice(values)
        place = random.choice(places)
        return data[: place.start()] + random.choice(values) + data[place.end() :]

    return mutation


def duplicate_key(random: Random, data: bytes) -> bytes:
    pairs = list(_PAIR.finditer(data))
    if not pairs:
        return data
    one, place = random.choice(pairs), random.choice(pairs)
    key = one.group().partition(b":")[0]
    return data[: place.start()] + key + b": " + random.choice(HOSTILE_JSON) + b", " + data[place.start() :]


def drop_pair(random: Random, data: bytes) -> bytes:
    pairs = list(_PAIR.finditer(data))
    if not pairs:
        return data
    place = random.choice(pairs)
    return data[: place.start()] + data[place.end() :].lstrip(b", ")


def insert_msgpack(random: Random, data: bytes) -> bytes:
    first, last = _cut(random, data)
    return data[:first] + random.choice(HOSTILE_MSGPACK) + data[random.choice((first, last)) :]


def other_encoding(random: Random, data: bytes) -> bytes:
    text = data.decode("latin-1")
    return random.choice(
        (b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-8"), data.replace(b"\n", b"\r"))
    )


def pack(random: Random, data: bytes) -> bytes:
    packed = gzip.compress(data, 1)
    return random.choice(
        (packed, packed + packed, packed[:-1], packed[:-8], flip(random, packed), packed + b"\x1f\x8b")
    )


def inflate(random: Random, data: bytes) -> bytes:
    first, _ = _cut(random, data)
    filler = random.choice((b"\x00", b"\n", b" ", b"[", b"9", b'{"a":', b"\x91", b"1,"))
    return gzip.compress(data[:first] + filler * (random.choice((64 * KB, MB)) // len(filler)) + data[first:], 1)


def nothing_but_noise(random: Random, data: bytes) -> bytes:
    return data[: random.choice((0, 1, 4))] + random.randbytes(random.choice((0, 1, 10, 1000)))


# The cheap ones more often than those that make files of a megabyte.
MUTATIONS: list[Mutation] = [
    truncate, flip, flip, drop, repeat, insert_noise, splice, shuffle_lines, repeat_lines, nothing_but_noise,
    _replace(_VALUE, HOSTILE_JSON), _replace(_VALUE, HOSTILE_JSON), _replace(_VALUE, HOSTILE_JSON), duplicate_key,
    drop_pair, _replace(_FIELD, HOSTILE_FIELDS), _replace(_FIELD, HOSTILE_FIELDS), insert_msgpack, insert_msgpack,
    other_encoding, pack,
]  # fmt: skip
RARE: list[Mutation] = [inflate]


def any_sample(random: Random) -> bytes:
    return random.choice(SAMPLES[random.choice(list(SAMPLES))])


def mutated(random: Random) -> tuple[str, bytes]:
    """Return (the format that it once was, a broken file)."""
    name = random.choice(list(SAMPLES))
    data = random.choice(SAMPLES[name])
    for _ in range(random.choice((1, 1, 2, 3))):
        data = random.choice(RARE if random.random() < 0.01 else MUTATIONS)(random, data)
    return name, data
