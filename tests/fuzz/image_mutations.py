"""What strangers may do to an image: each mutant is made by its number alone, so it can be made again."""

import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from blockd.units import GIB, KIB, MIB
from tests.fuzz.image_places import Place, Places, places_of
from tests.fuzz.image_seeds import Seed

# Names that must not lead anywhere, beside the canaries that the arena has.
_PLAIN_NAMES = b"""
. .. / disk ./disk folder fifo missing base.raw ./base.raw base.raw/ file:base.raw file: blkstream:base.raw
/etc/passwd ../outside/canary.raw ../outside/canary.qcow2 link link.qcow2 loop ~root/x $HOME `id` %s%n{0}
/dev/zero /dev/fd/0 /dev/stdin /proc/self/mem /proc/self/fd/1 /sys/power/state
json: json:{} json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}
nbd://127.0.0.1:1/x http://127.0.0.1:1/ fat:/etc fd:0 blkdebug::x
"""
_NAMES = [
    *_PLAIN_NAMES.split(),
    *(b"", b"\0", b"base.raw\0/etc/passwd", b"a\nb\x1b[31m", b"\xff\xfe\x80", b"\xe2\x80\xae.raw"),
    *(b"a/" * 500, b"n" * 255, b"n" * 1023),
]
# Deflate data of a cluster of zeroes that never ends, and of one that ends too early.
_BOMB = zlib.compressobj(9, zlib.DEFLATED, -12)
_BOMBS = [
    _BOMB.compress(bytes(16 * MIB)) + _BOMB.flush(),
    zlib.compress(b"short")[2:-4],
    b"\x28\xb5\x2f\xfd\xa4\xff\xff\xff\x7f\x4c\0\0\x08\0\x01\0\xfc\xff\x39\x10\x02" * 40,
    b"\x28\xb5\x2f\xfd" + b"\xff" * 100,
]
_LENGTH_MAX = 8 * MIB


class Mutant(NamedTuple):
    """A spoiled image: its bytes, how long the file is made behind them, and what was done to it."""

    content: bytes
    length: int
    told: str


class Mutator:
    """Spoils the images it was given."""

    def __init__(self, seeds: Sequence[Seed]) -> None:
        self.seeds = seeds
        self._places = [places_of(seed.image_format, seed.content) for seed in seeds]

    def mutant(self, number: int) -> tuple[Seed, Mutant, Random]:
        """Make the mutant of this number; the random numbers go on for what is done with it."""
        random = Random(number)
        index = random.randrange(len(self.seeds))
        spoiler = _Spoiler(self.seeds[index].content, self._places[index], random)
        return self.seeds[index], spoiler.spoiled(), random


class _Spoiler:
    """One image on its way to become a mutant."""

    def __init__(self, content: bytes, places: Places, random: Random) -> None:
        self._data = bytearray(content)
        self._length = len(content)
        self._places = places
        self._random = random

    def spoiled(self) -> Mutant:
        told = [
            self._random.choices(_WAYS, _WEIGHTS)[0](self)
            for _ in range(self._random.choice([1, 1, 2, 3, 5]))
        ]
        del self._data[_LENGTH_MAX:]
        return Mutant(bytes(self._data), max(self._length, len(self._data)), "; ".join(told))

    # -- numbers ------------------------------------------------------------------------------

    def _any_number(self, place: Place) -> int:
        """A value where something may turn over, or one near what is there."""
        random, width = self._random, place.width * 8
        now = place.get(self._data)
        size, step = len(self._data), self._places.cluster_size
        return random.choice(
            [
                *(0, 1, 2, 3, 7, 8, 9, 16, 21, 22, 31, 32, 63, 64, 512, 4096, 65535, 65536),
                *(now + 1, now - 1, now * 2, now // 2, now ^ 1 << random.randrange(width), ~now, -now),
                *((1 << width) - 1, 1 << width - 1, (1 << width - 1) - 1, 1 << random.randrange(width)),
                *(size, size - 1, size + 1, size - step, size + step, size // step, step - 1, step + 1),
                *(
                    1 << 20,
                    1 << 22,
                    1 << 30,
                    1 << 55,
                    1 << 56,
                    1 << 62,
                    0x00FF_FFFF_FFFF_FE00,
                    random.getrandbits(width),
                ),
            ]
        )

    def field_to_boundary(self) -> str:
        if not self._places.fields:
            return self.bits_turned()
        place = self._random.choice(self._places.fields)
        return self._put(place, self._any_number(place))

    def _put(self, place: Place, value: int) -> str:
        place.put(self._data, value)
        return f"{place.name} := {value:#x}"

    def _any_offset(self) -> int:
        """A place in the file or behind it, of a cluster mostly."""
        random, step = self._random, self._places.cluster_size
        tables = [table[0].offset for table in self._places.entries if table]
        inside = random.randrange(len(self._data) // step + 2) * step
        return random.choice(
            [
                *(
                    inside,
                    inside,
                    inside,
                    *tables,
                    0,
                    len(self._data) // step * step,
                    inside + 512,
                    inside + 1,
                ),
                *(1 << 40, 1 << 55, (1 << 56) - step, (1 << 63) - step, random.getrandbits(56), 1 << 61),
            ]
        )

    def entry_to_anywhere(self) -> str:
        tables = [table for table in self._places.entries if table]
        if not tables:
            return self.field_to_boundary()
        table = self._random.choice(tables)
        place = self._random.choice(table[: self._random.choice([4, 16, 64, len(table)])])
        value = self._any_offset() | self._random.choice(self._places.flags)
        if place.width < 8 or self._random.random() < 0.2:
            value = self._any_number(place)
        return self._put(place, value)

    def entries_alike(self) -> str:
        """Many entries name one place: a table that names itself, data that is shared."""
        tables = [table for table in self._places.entries if table]
        if not tables:
            return self.field_to_boundary()
        table = self._random.choice(tables)
        value = self._any_offset() | self._random.choice(self._places.flags)
        for place in table:
            place.put(self._data, value)
        return f"all of {table[0].name} at {table[0].offset:#x} := {value:#x}"

    # -- names --------------------------------------------------------------------------------

    def name_to_elsewhere(self) -> str:
        if self._places.name is None:
            return self.text_to_elsewhere()
        name = self._random.choice(_NAMES)
        offset, length = self._places.name
        where = offset.get(self._data) or self._random.choice(
            [400, 512, self._places.cluster_size - len(name)]
        )
        where = max(0, min(where, len(self._data)))
        self._data[where : where + len(name)] = name
        offset.put(self._data, where)
        length.put(self._data, len(name))
        return f"backing file {name[:80]!r} at {where}"

    def text_to_elsewhere(self) -> str:
        """For formats whose names are not known to be such: any text may be one."""
        if not self._places.texts:
            return self.field_to_boundary()
        start, end = self._random.choice(self._places.texts)
        name = self._random.choice(_NAMES)
        if self._random.random() < 0.5:
            name = name[: end - start].ljust(end - start, b"\0")
        self._data[start : start + len(name)] = name
        return f"text at {start}: {name[:80]!r}"

    # -- bytes --------------------------------------------------------------------------------

    def bits_turned(self) -> str:
        count = self._random.choice([1, 1, 3, 20])
        for _ in range(count if self._data else 0):
            limit = self._random.choice([112, 512, len(self._data)])
            self._data[self._random.randrange(min(limit, len(self._data)))] ^= 1 << self._random.randrange(8)
        return f"{count} bits turned"

    def range_copied(self) -> str:
        """A table where data was, a header in the middle, noise over either."""
        step = self._places.cluster_size
        clusters = len(self._data) // step + 1
        source, target = (self._random.randrange(clusters) * step for _ in range(2))
        part = self._data[source : source + step]
        if self._random.random() < 0.3:
            part = bytearray(self._random.randbytes(step))
        self._data[target : target + len(part)] = part
        return f"cluster at {source:#x} to {target:#x}"

    def bomb(self) -> str:
        bomb = self._random.choice(_BOMBS)
        where = self._random.randrange(len(self._data) // 512 + 1) * 512
        self._data[where : where + len(bomb)] = bomb
        return f"compressed data at {where:#x}"

    def cut(self) -> str:
        limit = self._random.choice([112, 512, 4096, len(self._data)])
        del self._data[self._random.randrange(min(limit, len(self._data)) + 1) :]
        self._length = len(self._data)
        return f"cut at {len(self._data)}"

    def extended(self) -> str:
        step = self._places.cluster_size
        self._length = len(self._data) + self._random.choice(
            [1, step, 64 * KIB, 32 * MIB, GIB, 1 << 40, 1 << 43]
        )
        return f"extended to {self._length:#x}"


_Way = Callable[[_Spoiler], str]
_CHOSEN: dict[_Way, int] = {
    _Spoiler.field_to_boundary: 30,
    _Spoiler.entry_to_anywhere: 30,
    _Spoiler.entries_alike: 4,
    _Spoiler.name_to_elsewhere: 8,
    _Spoiler.text_to_elsewhere: 3,
    _Spoiler.bits_turned: 8,
    _Spoiler.range_copied: 6,
    _Spoiler.bomb: 3,
    _Spoiler.cut: 5,
    _Spoiler.extended: 3,
}
_WAYS, _WEIGHTS = list(_CHOSEN), list(_CHOSEN.values())
