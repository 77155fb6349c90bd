"""Fuzz the QMP reader: `python -m tests.fuzz.fuzz_qmp [COUNT] [--seed N]`.

Each stream is read whole, split at random places, and with long tokens cut into the smallest parts: the
messages must be the same each time. A valid stream must give what it was made of. After any stream, 0xFF
and a command must give that command. A failure names the seed that makes its stream again.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from blockd.units import MIB
from blockd.wire.qmp import Message, ParseError, lexer
from blockd.wire.qmp.reader import JsonReader
from tests.fuzz.memory import peak_memory
from tests.fuzz.qmp_streams import broken_stream, noise, valid_stream

COUNT = 2000
RESYNCHRONISE = b'\xff{"execute": "stop"}'
STOP = {"execute": "stop"}


@dataclass
class Figures:
    """What a run saw."""

    streams: int = 0
    octets: int = 0
    values: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest_seed: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        peak = peak_memory() / MIB
        lines = [
            f"{self.streams:,} streams, {self.octets:,} bytes, {self.values:,} values, "
            f"{self.errors.total():,} parse errors in {self.seconds:.0f} s; no failure",
            f"slowest stream {self.slowest_s * 1000:.1f} ms of processor time (seed {self.slowest_seed}), "
            f"peak memory {peak:.0f} MiB",
            *(f"{count:12,}  {text}" for text, count in self.errors.most_common()),
        ]
        return "\n".join(lines)


def run(count: int, seed: int) -> Figures:
    """Read `count` streams.

    Raises:   AssertionError: the reader did something wrong; names the seed.
    """
    figures = Figures()
    began = time.monotonic()
    for number in range(seed, seed + count):
        try:
            _run_one(Random(number), number, figures)
        except Exception as error:
            raise AssertionError(f"seed {number}: {error!r}") from error
    figures.seconds = time.monotonic() - began
    return figures


def _run_one(random: Random, seed: int, figures: Figures) -> None:
    data, values = _stream(random)
    began = time.process_time()
    messages = _read([data])
    took_s = time.process_time() - began
    if values is not None:
        assert repr(messages) == repr(values), data  # `==` takes 1 for True
    pieces = _split(data, random)
    assert _read(pieces) == messages, pieces
    part_length = random.choice([1, 2, 3, 7, 20])
    assert _read(pieces, part_length) == messages, (part_length, pieces)
    assert _read([data, RESYNCHRONISE])[-1] == STOP, data
    _count(figures, data, messages)
    if took_s > figures.slowest_s:
        figures.slowest_s, figures.slowest_seed = took_s, seed


def _stream(random: Random) -> tuple[bytes, list[object] | None]:
    match random.randrange(5):
        case 0:
            data, values = valid_stream(random)
            return data, list(values)
        case 1 | 2 | 3:
            return broken_stream(random), None
    return noise(random), None


def _split(data: bytes, random: Random) -> list[bytes]:
    places = sorted(random.randrange(len(data) + 1) for _ in range(random.choice([1, 2, 5, 40])))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def _read(pieces: list[bytes], part_length: int = lexer.PART_LENGTH) -> list[object]:
    """Read a stream; errors stand as their text, which no value can be: it is a tuple."""
    usual, lexer.PART_LENGTH = lexer.PART_LENGTH, part_length
    try:
        stream = JsonReader()
        return [_comparable(message) for piece in pieces for message in stream.feed(piece)]
    finally:
        lexer.PART_LENGTH = usual


def _comparable(message: Message) -> object:
    return ("error", message.message) if isinstance(message, ParseError) else message


def _count(figures: Figures, data: bytes, messages: list[object]) -> None:
    figures.streams += 1
    figures.octets += len(data)
    for message in messages:
        if isinstance(message, tuple):
            figures.errors[_kind(message[1])] += 1
        else:
            figures.values += 1


def _kind(text: str) -> str:
    """The text of an error without what it cites."""
    for start in ("stray", "invalid keyword"):
        if start in text:
            return f"JSON parse error, {start} …"
    return "JSON parse error, … is not a valid Unicode character" if "Unicode" in text else text


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the QMP reader.")
    parser.add_argument("count", nargs="?", type=int, default=COUNT, help=f"how many streams ({COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="of the first stream (0)")
    options = parser.parse_args()
    print(run(options.count, options.seed))


if __name__ == "__main__":
    main()
