"""What the commands of one topic are registered in; `table` puts the topics together.

Apart from the context, which the daemon has before any command: tables come with models, and those are slow
to load.
"""

from blockd.commands.context import Services
from blockd.qmp.table import CommandTable

Table = CommandTable[Services]
