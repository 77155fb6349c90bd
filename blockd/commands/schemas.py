"""Write the JSON Schema of every command and event: `python -m blockd.commands.schemas FOLDER [--check]`."""

import argparse
import sys
from pathlib import Path

from blockd.commands.events import EVENTS
from blockd.commands.table import COMMANDS
from blockd.qmp.schema import differing_documents, schema_documents, write_documents
from blockd.qmp.session_commands import SESSION_COMMANDS

DOCUMENTS = schema_documents([COMMANDS, SESSION_COMMANDS], EVENTS)


def main() -> None:
    """Write the folder, or with --check say what in it is out of date and exit with status 1."""
    parser = argparse.ArgumentParser(description="Write the JSON Schema of every QMP command and event.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    if not options.check:
        write_documents(options.folder, DOCUMENTS)
    elif outdated := differing_documents(options.folder, DOCUMENTS):
        sys.exit(f"out of date, run `make schemas`: {' '.join(map(str, outdated))}")


if __name__ == "__main__":
    main()
