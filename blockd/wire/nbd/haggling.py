"""The haggling before transmission: greeting, options and their replies.

    server  NBDMAGIC IHAVEOPT flags(2)
    client  flags(4)
    client  IHAVEOPT option(4) length(4) data            any number of times, until
    server  REPLY_MAGIC option(4) type(4) length(4) data     an option ends the haggling

All numbers are big-endian.
"""

import struct
from typing import Final, NamedTuple

from blockd.errors import PeerError
from blockd.wire.nbd import constants as nbd

Readable = bytes | bytearray | memoryview

_GREETING: Final = struct.Struct(">QQH")
_CLIENT_FLAGS: Final = struct.Struct(">I")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_EXPORT_NAME_REPLY: Final = struct.Struct(">QH")

GREETING_SIZE: Final = _GREETING.size
CLIENT_FLAGS_SIZE: Final = _CLIENT_FLAGS.size
OPTION_HEADER_SIZE: Final = _OPTION.size
OPTION_REPLY_HEADER_SIZE: Final = _OPTION_REPLY.size
EXPORT_NAME_PADDING: Final = 124

_KNOWN_FLAGS: Final = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES


class GoOption(NamedTuple):
    """What a client says with GO and INFO."""

    name: str
    infos: list[int]


class MetaOption(NamedTuple):
    """What a client says with LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: list[str]


class OptionReply(NamedTuple):
    """The head of a server's reply to an option."""

    option: int
    reply: int
    length: int


class ExportInfo(NamedTuple):
    """Size and transmission flags of an export."""

    size: int
    flags: int


# -- greeting ---------------------------------------------------------------------------------


def pack_greeting(flags: int = _KNOWN_FLAGS) -> bytes:
    return _GREETING.pack(nbd.GREETING_MAGIC, nbd.OPTION_MAGIC, flags)


def parse_greeting(data: Readable) -> int:
    """Return the server's handshake flags."""
    magic, option_magic, flags = _unpack(_GREETING, data)
    if magic != nbd.GREETING_MAGIC or option_magic != nbd.OPTION_MAGIC:
        raise PeerError("the server is not a newstyle NBD server")
    return flags


def pack_client_flags(flags: int) -> bytes:
    return _CLIENT_FLAGS.pack(flags)


def parse_client_flags(data: Readable) -> int:
    (flags,) = _unpack(_CLIENT_FLAGS, data)
    if flags & ~_KNOWN_FLAGS:
        raise PeerError(f"unknown client flags {flags:#x}")
    return flags


# -- options, from the client -----------------------------------------------------------------


def pack_option(option: int, data: bytes = b"") -> bytes:
    return _OPTION.pack(nbd.OPTION_MAGIC, option, len(data)) + data


def parse_option_header(data: Readable) -> tuple[int, int]:
    """Return the option and the length of its data."""
    magic, option, length = _unpack(_OPTION, data)
    if magic != nbd.OPTION_MAGIC:
        raise PeerError("an option does not start with IHAVEOPT")
    return option, length


def pack_go(go: GoOption) -> bytes:
    return _pack_string(go.name) + struct.pack(f">H{len(go.infos)}H", len(go.infos), *go.infos)


def parse_go(data: Readable) -> GoOption:
    name, position = _parse_string(data, 0)
    (count,) = _unpack(_U16, data, position)
    position += _U16.size
    if len(data) != position + count * _U16.size:
        raise PeerError(f"{count} information requests do not fit the option's length")
    return GoOption(name, list(struct.unpack_from(f">{count}H", data, position)))


def pack_meta(meta: MetaOption) -> bytes:
    queries = b"".join(map(_pack_string, meta.queries))
    return _pack_string(meta.name) + _U32.pack(len(meta.queries)) + queries


def parse_meta(data: Readable) -> MetaOption:
    name, position = _parse_string(data, 0)
    (count,) = _unpack(_U32, data, position)
    position += _U32.size
    if count > nbd.QUERY_COUNT_MAX:
        raise PeerError(f"{count} metadata context queries; at most {nbd.QUERY_COUNT_MAX} are allowed")
    queries: list[str] = []
    for _ in range(count):
        query, position = _parse_string(data, position)
        queries.append(query)
    if position != len(data):
        raise PeerError("the metadata context queries do not fit the option's length")
    return MetaOption(name, queries)


def parse_name(data: Readable) -> str:
    """Read an export's name; NAME_LENGTH_MAX holds for every string of the protocol."""
    if len(data) > nbd.NAME_LENGTH_MAX:
        raise PeerError(f"a name of {len(data)} bytes; at most {nbd.NAME_LENGTH_MAX} are allowed")
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as error:
        raise PeerError("a name is not UTF-8") from error


# -- replies, from the server -----------------------------------------------------------------


def pack_option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return _OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def parse_option_reply(data: Readable) -> OptionReply:
    magic, option, reply, length = _unpack(_OPTION_REPLY, data)
    if magic != nbd.OPTION_REPLY_MAGIC:
        raise PeerError("an option reply does not start with its magic number")
    if length > nbd.OPTION_LENGTH_MAX:
        raise PeerError(f"an option reply of {length} bytes; at most {nbd.OPTION_LENGTH_MAX} are allowed")
    return OptionReply(option, reply, length)


def pack_export_name_reply(info: ExportInfo, *, padded: bool) -> bytes:
    return _EXPORT_NAME_REPLY.pack(*info) + bytes(EXPORT_NAME_PADDING if padded else 0)


def pack_listed(name: str, description: str) -> bytes:
    """Describe one export in the answer to LIST."""
    return _pack_string(name) + description.encode()


def parse_listed(data: Readable) -> tuple[str, str]:
    name, position = _parse_string(data, 0)
    return name, parse_name(memoryview(data)[position:])


def pack_info_export(info: ExportInfo) -> bytes:
    return _INFO_EXPORT.pack(nbd.INFO_EXPORT, *info)


def parse_info_export(data: Readable) -> ExportInfo:
    _, size, flags = _unpack(_INFO_EXPORT, data)
    return ExportInfo(size, flags)


def pack_info_text(info: int, text: str) -> bytes:
    """Pack a name or a description."""
    return _U16.pack(info) + text.encode()


def pack_info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    return _INFO_BLOCK_SIZE.pack(nbd.INFO_BLOCK_SIZE, minimum, preferred, maximum)


def parse_info_type(data: Readable) -> int:
    """Tell which kind of information a REP_INFO carries."""
    (info,) = _unpack(_U16, data)
    return int(info)


def pack_meta_context(context_id: int, name: str) -> bytes:
    return _U32.pack(context_id) + name.encode()


def parse_meta_context(data: Readable) -> tuple[int, str]:
    (context_id,) = _unpack(_U32, data)
    return context_id, parse_name(memoryview(data)[_U32.size :])


# -- pieces -----------------------------------------------------------------------------------


def _unpack(layout: struct.Struct, data: Readable, offset: int = 0) -> tuple[int, ...]:
    try:
        return layout.unpack_from(data, offset)
    except struct.error as error:
        raise PeerError("a message is shorter than its contents need") from error


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return _U32.pack(len(data)) + data


def _parse_string(data: Readable, position: int) -> tuple[str, int]:
    """Read a string preceded by its length; return it and the position behind it."""
    (length,) = _unpack(_U32, data, position)
    start = position + _U32.size
    if start + length > len(data):
        raise PeerError("a string reaches beyond the end of its message")
    return parse_name(memoryview(data)[start : start + length]), start + length
