"""What a guest is told when something failed: our errors as NBD's numbers."""

import errno
from typing import Final

from blockd.errors import BlockdError, ErrorKind, RequestError, StorageError
from blockd.wire.nbd import constants as nbd

_BY_ERRNO: Final = {
    errno.EPERM: nbd.EPERM,
    errno.EACCES: nbd.EPERM,
    errno.EROFS: nbd.EPERM,
    errno.ENOMEM: nbd.ENOMEM,
    errno.EINVAL: nbd.EINVAL,
    errno.ENOSPC: nbd.ENOSPC,
    errno.EDQUOT: nbd.ENOSPC,
    errno.EFBIG: nbd.ENOSPC,
    errno.EOVERFLOW: nbd.EOVERFLOW,
    errno.ENOTSUP: nbd.ENOTSUP,
    errno.ESHUTDOWN: nbd.ESHUTDOWN,
}

_BY_KIND: Final = {
    ErrorKind.READ_ONLY: nbd.EPERM,
    ErrorKind.NOT_SUPPORTED: nbd.ENOTSUP,
    ErrorKind.NO_SPACE: nbd.ENOSPC,
}


def nbd_error(error: BlockdError) -> int:
    """Translate; what has no number of its own in the protocol is EIO."""
    if isinstance(error, StorageError):
        return _BY_ERRNO.get(error.errno, nbd.EIO)
    return _BY_KIND.get(error.kind, nbd.EINVAL if isinstance(error, RequestError) else nbd.EIO)
