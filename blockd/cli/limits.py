"""The limits that whoever starts the daemon has set."""

import resource

from blockd.errors import RequestError
from blockd.units import GIB, MIB

# Libraries end the process where there is no memory, and the stacks of many threads need as much as this.
ADDRESS_SPACE_MIN = 1 * GIB


def require_address_space() -> None:
    """Refuse to start where memory is going to run out.

    Raises:   RequestError: there is a limit on the address space, and it is too low.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_MIN:
        raise RequestError(
            f"the limit on the address space is {limit // MIB} MiB, and blockd needs "
            f"{ADDRESS_SPACE_MIN // MIB} MiB: raise it with ulimit -v; to limit memory, use a memory cgroup"
        )
