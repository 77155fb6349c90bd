"""Where names inside images may point to.

A backing file's name comes from the image, and so perhaps from a stranger: it is taken as a plain path,
and only when that leads into the image's own folder or to what the daemon's user has named.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

from blockd.errors import RequestError, printable
from blockd.filenames import has_control_characters, real_path, without_protocol
from blockd.found_files import Folder, FoundFile

# Doors to whatever this process has open, or to the kernel itself.
_FORBIDDEN = ("/proc", "/sys", "/dev/fd", "/dev/fdset", "/dev/stdin", "/dev/stdout", "/dev/stderr")


class ImagePaths:
    """The folders and files that names inside images may lead to, besides the image's own folder.

    Its methods block on the file system.
    """

    def __init__(self, folders: Iterable[str] = (), *, on: "ImagePaths | None" = None) -> None:
        self._folders = [PurePath(real_path(folder)) for folder in folders]
        # How often each was allowed.
        self._files: Counter[PurePath] = Counter()
        self._owners: dict[object, str] = {}
        # Allows what this one does, and is told nothing of what this one is told.
        self._on = on

    def allow(self, location: str, owner: object = None) -> None:
        """Let images name the file that is there: the daemon's user did, and it was opened as `owner`."""
        self._files[PurePath(location)] += 1
        if owner is not None:
            self._owners[owner] = location

    def location_of(self, owner: object) -> str | None:
        """What was allowed with an owner."""
        return self._owners.get(owner)

    def disallow(self, location: str | None = None, *, owner: object = None) -> None:
        """Take back what was allowed once, or with an owner if anything was."""
        found = self._owners.pop(owner, location)
        if found is None:
            return
        path = PurePath(found)
        self._files[path] -= 1
        if not self._files[path]:
            del self._files[path]

    def is_allowed_file(self, location: str) -> bool:
        """Whether the file that is there was allowed, and not for its folder."""
        return PurePath(location) in self._files

    @property
    def allowed_files(self) -> list[str]:
        """The files that are allowed, in the order in which they were."""
        return [str(path) for path in self._files]

    def find(self, name: str, folder: Folder, role: str = "backing file") -> FoundFile:
        """Find the file that `name` stands for, recorded by the image in `folder` as its `role`.

        Raises:   RequestError: the name is none that an image may have, or leads to nothing.
        """
        image = folder.filename
        if has_control_characters(name):
            raise RequestError(f"'{image}' has control characters in its {role} name '{printable(name)}'")
        path = without_protocol(name)
        no_image = RequestError(f"'{image}' names '{name}' as its {role}, which is no image file")
        if _is_forbidden(PurePath(path)):
            raise no_image
        found = FoundFile.find_recorded(path, folder)
        try:
            location = PurePath(found.location)
            if _is_forbidden(location):
                raise no_image
            if not self._is_allowed(location, PurePath(found.folder_location), PurePath(folder.location)):
                raise RequestError(
                    f"'{image}' names '{name}' as its {role}, which is outside the folder of the image; "
                    f"allow it with --image-paths {location.parent}"
                )
        except BaseException:
            found.close()
            raise
        return found

    def _is_allowed(self, location: PurePath, through: PurePath, own: PurePath) -> bool:
        """Whether a file may be named; `through`: the folder that its own names count from."""

        def is_inside(path: PurePath) -> bool:
            return path.is_relative_to(own) or any(map(path.is_relative_to, self._all_folders()))

        is_through_own = through == location.parent or is_inside(through)
        return is_through_own and (self._is_allowed_file(location) or is_inside(location))

    def _all_folders(self) -> list[PurePath]:
        return self._folders if self._on is None else [*self._folders, *self._on._all_folders()]

    def _is_allowed_file(self, location: PurePath) -> bool:
        return location in self._files or (self._on is not None and self._on._is_allowed_file(location))


def _is_forbidden(path: PurePath) -> bool:
    return any(path.is_relative_to(door) for door in _FORBIDDEN)
