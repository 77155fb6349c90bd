"""What the source says about each member of a model: the docstring that stands below it.

pydantic can read these itself, for every class when it is made, and for that parses its source: a quarter
of what a daemon's start took. Only documents need them, so only who makes documents pays.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise

from pydantic import BaseModel


def describe_fields(model: type[BaseModel]) -> None:
    """Give the fields of `model` and of all its subclasses the docstrings below them as descriptions."""
    described = [(each, _describe(each)) for each in _with_subclasses(model)]
    for each, is_changed in described:
        if is_changed:
            each.__pydantic_complete__ = False
    for each, _ in described:
        each.model_rebuild(force=True)


def _with_subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for subclass in model.__subclasses__():
        yield from _with_subclasses(subclass)


def _describe(model: type[BaseModel]) -> bool:
    texts: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            texts |= _docstrings(each)
    fields = [(field, texts[name]) for name, field in model.model_fields.items() if name in texts]
    for field, text in fields:
        field.description = field.description or text
    return bool(fields)


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings of what the class itself names."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        statement.target.id: inspect.cleandoc(below.value.value)
        for statement, below in pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(below.value.value, str)
    }
