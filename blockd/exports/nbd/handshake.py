"""The haggling as the server sees it: bytes of options in, bytes of replies out, terms at the end.

Every option has one small handler in `_HANDLERS`; an option that is not there is answered with
NBD_REP_ERR_UNSUP. A handler that cannot read its option's data answers NBD_REP_ERR_INVALID and the
haggling goes on; what breaks the framing itself raises PeerError and costs the connection.
"""

from collections.abc import Callable, Mapping

from blockd.errors import PeerError
from blockd.exports.nbd.block_sizes import block_sizes
from blockd.exports.nbd.export import CONTEXTS, Export, Terms, find_export, not_present
from blockd.wire.nbd import constants as nbd
from blockd.wire.nbd import haggling as wire


class Handshake:
    """One client's haggling; `replies` are to be sent, `terms` are there once it has succeeded."""

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self.replies: list[bytes] = [wire.pack_greeting()]
        self.terms: Terms | None = None
        self.is_aborted = False
        self._exports = exports
        self._client_flags: int | None = None
        self._option = 0
        self._option_count = 0
        self._is_structured = False
        # What was asked for of block status, and for which export.
        self._contexts: tuple[Export | None, tuple[str, ...]] = None, ()

    def take(self, data: memoryview) -> int:
        """Work through the complete messages in `data`; return how many bytes were used.

        Raises:   PeerError: the connection has to be closed, after sending `replies`.
        """
        used = 0
        while not (self.terms or self.is_aborted):
            length = self._take_one(data[used:])
            if not length:
                break
            used += length
        return used

    def _take_one(self, data: memoryview) -> int:
        if self._client_flags is None:
            if len(data) < wire.CLIENT_FLAGS_SIZE:
                return 0
            self._client_flags = wire.parse_client_flags(data)
            return wire.CLIENT_FLAGS_SIZE
        if len(data) < wire.OPTION_HEADER_SIZE:
            return 0
        self._option, length = wire.parse_option_header(data)
        self._check_limits(length)
        end = wire.OPTION_HEADER_SIZE + length
        if len(data) < end:
            return 0
        self._option_count += 1
        self._handle(bytes(data[wire.OPTION_HEADER_SIZE : end]))
        return end

    def _check_limits(self, length: int) -> None:
        if length > nbd.OPTION_LENGTH_MAX:
            self._reply(nbd.REP_ERR_TOO_BIG, b"the option is too long")
            raise PeerError(f"an option of {length} bytes; at most {nbd.OPTION_LENGTH_MAX} are allowed")
        if self._option_count >= nbd.OPTION_COUNT_MAX:
            raise PeerError(f"more than {nbd.OPTION_COUNT_MAX} options")

    def _handle(self, data: bytes) -> None:
        if self._option == nbd.OPT_EXPORT_NAME:
            self._export_name(data)
            return
        if not (self._client_flags or 0) & nbd.FLAG_FIXED_NEWSTYLE:
            raise PeerError(f"option {self._option} from a client that is not fixed newstyle")
        handler = _HANDLERS.get(self._option)
        if handler is None:
            self._reply(nbd.REP_ERR_UNSUP, b"this option is not supported")
            return
        try:
            handler(self, data)
        except PeerError as error:
            self._reply(nbd.REP_ERR_INVALID, error.message.encode())

    def _reply(self, reply: int, data: bytes = b"") -> None:
        self.replies.append(wire.pack_option_reply(self._option, reply, data))

    # -- the end of the haggling --------------------------------------------------------------

    def _export_name(self, data: bytes) -> None:
        """The old way to choose: it has no error reply, so a wrong name costs the connection."""
        name = wire.parse_name(data)
        export = find_export(self._exports, name)
        if export is None:
            raise PeerError(not_present(name))
        is_padded = not (self._client_flags or 0) & nbd.FLAG_NO_ZEROES
        info = export.info(structured=self._is_structured)
        self.replies.append(wire.pack_export_name_reply(info, padded=is_padded))
        self._agree(export)

    def _go(self, data: bytes) -> None:
        export = self._info(data)
        if export is not None:
            self._agree(export)

    def _agree(self, export: Export) -> None:
        asked_for, contexts = self._contexts
        self.terms = Terms(export, self._is_structured, contexts if asked_for is export else (), client=self)

    def _abort(self, data: bytes) -> None:
        self._reply(nbd.REP_ACK)
        self.is_aborted = True

    # -- what can be asked before -------------------------------------------------------------

    def _info(self, data: bytes) -> Export | None:
        """Describe an export and return it.

        As QEMU does: description and block sizes are told to clients that have not asked for them, too.
        """
        go = wire.parse_go(data)
        export = self._find(go.name)
        if export is None:
            return None
        if nbd.INFO_NAME in go.infos:
            self._reply(nbd.REP_INFO, wire.pack_info_text(nbd.INFO_NAME, export.name))
        if export.description:
            self._reply(nbd.REP_INFO, wire.pack_info_text(nbd.INFO_DESCRIPTION, export.description))
        keeps_to_sizes = nbd.INFO_BLOCK_SIZE in go.infos
        sizes = block_sizes(export.root.top, has_minimum=keeps_to_sizes or self._option == nbd.OPT_INFO)
        self._reply(nbd.REP_INFO, wire.pack_info_block_size(*sizes))
        self._reply(nbd.REP_INFO, wire.pack_info_export(export.info(structured=self._is_structured)))
        if not keeps_to_sizes and sizes.minimum > 1:
            self._reply(nbd.REP_ERR_BLOCK_SIZE_REQD, b"request NBD_INFO_BLOCK_SIZE to use this export")
            return None
        self._reply(nbd.REP_ACK)
        return export

    def _find(self, name: str) -> Export | None:
        export = find_export(self._exports, name)
        if export is None:
            self._reply(nbd.REP_ERR_UNKNOWN, not_present(name).encode())
        return export

    def _list(self, data: bytes) -> None:
        if data:
            raise PeerError("LIST takes no data")
        for export in self._exports.values():
            self._reply(nbd.REP_SERVER, wire.pack_listed(export.name, export.description))
        self._reply(nbd.REP_ACK)

    def _structured_reply(self, data: bytes) -> None:
        if data:
            raise PeerError("STRUCTURED_REPLY takes no data")
        self._is_structured = True
        self._reply(nbd.REP_ACK)

    def _list_meta_context(self, data: bytes) -> None:
        meta = self._parse_meta(data)
        export = self._find(meta.name)
        if export is None:
            return
        for name in export.contexts:
            namespace = name.partition(":")[0] + ":"
            if not meta.queries or {namespace, name} & set(meta.queries):
                self._reply(nbd.REP_META_CONTEXT, wire.pack_meta_context(0, name))
        self._reply(nbd.REP_ACK)

    def _set_meta_context(self, data: bytes) -> None:
        self._contexts = None, ()
        meta = self._parse_meta(data)
        export = self._find(meta.name)
        if export is None:
            return
        contexts = tuple(name for name in export.contexts if name in meta.queries)
        self._contexts = export, contexts
        for name in contexts:
            self._reply(nbd.REP_META_CONTEXT, wire.pack_meta_context(CONTEXTS[name], name))
        self._reply(nbd.REP_ACK)

    def _parse_meta(self, data: bytes) -> wire.MetaOption:
        if not self._is_structured:
            raise PeerError("metadata contexts need structured replies: negotiate them first")
        return wire.parse_meta(data)


_HANDLERS: Mapping[int, Callable[[Handshake, bytes], object]] = {
    nbd.OPT_ABORT: Handshake._abort,
    nbd.OPT_LIST: Handshake._list,
    nbd.OPT_INFO: Handshake._info,
    nbd.OPT_GO: Handshake._go,
    nbd.OPT_STRUCTURED_REPLY: Handshake._structured_reply,
    nbd.OPT_LIST_META_CONTEXT: Handshake._list_meta_context,
    nbd.OPT_SET_META_CONTEXT: Handshake._set_meta_context,
}
