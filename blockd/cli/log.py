"""The daemon's log: one line a message, on standard error, that cannot garble a terminal."""

import logging

from blockd.errors import printable


class _LineFormatter(logging.Formatter):
    """Names in messages come from images and clients: what they must not do to a terminal is escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def start_log() -> None:
    """Let warnings and errors go to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter("blockd: %(levelname)s: %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # A line that cannot be written, on a full disk say, is no reason for a traceback.
    logging.raiseExceptions = False
