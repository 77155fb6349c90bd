"""The protocol's numbers, and the limits on what a peer may send."""

from typing import Final

from blockd.units import KIB, MIB

# -- limits -----------------------------------------------------------------------------------

NAME_LENGTH_MAX: Final = 4096
OPTION_LENGTH_MAX: Final = 32 * KIB
OPTION_COUNT_MAX: Final = 1024
QUERY_COUNT_MAX: Final = 64
REQUEST_LENGTH_MAX: Final = 32 * MIB

# -- magic numbers ----------------------------------------------------------------------------

GREETING_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

# -- haggling ---------------------------------------------------------------------------------

# Handshake flags of the server, and with the same values of the client.
FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR_BIT: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_ERROR_BIT | 1
REP_ERR_INVALID: Final = REP_ERROR_BIT | 3
REP_ERR_UNKNOWN: Final = REP_ERROR_BIT | 6
REP_ERR_BLOCK_SIZE_REQD: Final = REP_ERROR_BIT | 8
REP_ERR_TOO_BIG: Final = REP_ERROR_BIT | 9

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

# -- transmission -----------------------------------------------------------------------------

TRANSMISSION_HAS_FLAGS: Final = 1 << 0
TRANSMISSION_READ_ONLY: Final = 1 << 1
TRANSMISSION_SEND_FLUSH: Final = 1 << 2
TRANSMISSION_SEND_FUA: Final = 1 << 3
TRANSMISSION_SEND_TRIM: Final = 1 << 5
TRANSMISSION_SEND_WRITE_ZEROES: Final = 1 << 6
TRANSMISSION_SEND_DF: Final = 1 << 7
TRANSMISSION_CAN_MULTI_CONN: Final = 1 << 8
TRANSMISSION_SEND_CACHE: Final = 1 << 10
TRANSMISSION_SEND_FAST_ZERO: Final = 1 << 11

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

CHUNK_FLAG_DONE: Final = 1 << 0

CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_ERROR_BIT | 1

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108
