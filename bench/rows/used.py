"""Streaming into overlays that were used before, over chains that were."""

from functools import partial

from bench.lab import Lab
from bench.peers import Peer, Work
from bench.rows import Figure, Row, Sample
from bench.rows.streams import DURATION, stream_into
from bench.used import CHAIN_RECIPES, EXTENDED_RECIPES, RECIPES, Recipe

CPU_TIME = Figure("CPU time", "s", is_more_better=False)


def _stream(lab: Lab, peer: Peer, recipe: Recipe) -> Sample:
    overlay, expected = recipe.make(lab)
    stream = stream_into(lab, peer, overlay, expected)
    return {DURATION.name: stream.duration_s, CPU_TIME.name: stream.cpu_s}


def _row(prefix: str, recipe: Recipe, work: Work = Work.QMP) -> Row:
    name = f"{prefix}: {recipe.name}"
    return Row(name, (DURATION, CPU_TIME), partial(_stream, recipe=recipe), work=work)


ROWS = [
    *(_row("used overlay", recipe) for recipe in RECIPES),
    *(_row("used overlay", recipe, Work.SUBCLUSTERS) for recipe in EXTENDED_RECIPES),
    *(_row("used chain", recipe) for recipe in CHAIN_RECIPES),
]
