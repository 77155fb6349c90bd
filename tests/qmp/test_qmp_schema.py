"""The schemas in the tree are those of the models, and say what the models do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blockd.commands.schemas import DOCUMENTS
from blockd.qmp.schema import differing_documents, schema_documents, write_documents
from tests.qmp.toys import TOYS, Quiet, Rang

SCHEMAS = Path(__file__).parents[2] / "schemas"


def test_schemas_in_the_tree_are_up_to_date() -> None:
    assert differing_documents(SCHEMAS, DOCUMENTS) == [], "run `make schemas`"


def test_every_command_and_event_says_what_it_is_for() -> None:
    silent = [path for path, text in DOCUMENTS.items() if not json.loads(text)["description"]]
    assert silent == []


def test_references_lead_to_definitions() -> None:
    for path, text in DOCUMENTS.items():
        definitions = json.loads(text).get("$defs", {})
        for reference in text.split('"#/$defs/')[1:]:
            assert reference.partition('"')[0] in definitions, path


def test_schema_of_a_command() -> None:
    documents = schema_documents([TOYS], [Rang, Quiet])
    schema = json.loads(documents[Path("commands/stream.json")])
    arguments = schema["properties"]["arguments"]
    assert arguments["required"] == ["device"]
    assert arguments["additionalProperties"] is False
    assert arguments["properties"]["on-error"]["enum"] == ["report", "ignore", "stop"]
    # None in code is a member left out, not null.
    assert arguments["properties"]["base"]["type"] == "string"
    assert "null" not in documents[Path("commands/stream.json")].replace('"description": null', "")
    assert schema["x-allow-oob"] is False
    note = json.loads(documents[Path("commands/note.json")])
    assert note["properties"]["return"] == {"type": "object", "properties": {}, "additionalProperties": False}
    rang = json.loads(documents[Path("events/RANG.json")])
    assert list(rang["properties"]["data"]["properties"]) == ["note", "louder-than"]


def test_folder_is_made_to_match(tmp_path: Path) -> None:
    documents = schema_documents([TOYS], [Rang])
    write_documents(tmp_path, documents)
    assert differing_documents(tmp_path, documents) == []
    (tmp_path / "events" / "GONE.json").write_text("{}")
    (tmp_path / "commands" / "note.json").write_text("{}")
    (tmp_path / "commands" / "ring.json").unlink()
    changed = [Path("commands/note.json"), Path("commands/ring.json"), Path("events/GONE.json")]
    assert differing_documents(tmp_path, documents) == changed
    write_documents(tmp_path, documents)
    assert differing_documents(tmp_path, documents) == []
    assert not (tmp_path / "events" / "GONE.json").exists()


@pytest.mark.slow
def test_program(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "blockd.commands.schemas", str(tmp_path)]
    refused = subprocess.run([*program, "--check"], capture_output=True, check=False)
    assert refused.returncode == 1
    assert b"make schemas" in refused.stderr
    assert b"commands/block_stream.json" in refused.stderr
    subprocess.run(program, check=True)
    subprocess.run([*program, "--check"], check=True)
