"""The knobs of a room: names, types and defaults of keyword arguments, read from its source text.

Nothing is imported, so that a config costs no JAX.  A knob is a field of a dataclass or linen
Module, or a keyword-only argument of a function; its default is a literal.
"""

import ast
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

Knobs = Mapping[str, tuple[type, Any]]  # key -> (type, default); a default of None: not set


@functools.cache
def knobs(kind: str) -> Mapping[str, Knobs]:
  """name -> knobs of everything that can be chosen as `kind`: found by file or function name."""
  root = pathlib.Path(__file__).parent
  if kind == 'tokenizer':
    functions = [n for n in _body(root / 'data/tokenizer.py') if isinstance(n, ast.FunctionDef)]
    kinds = [f for f in functions if f.args.args[:1] and f.args.args[0].arg == 'texts']
    return {f.name.strip('_'): _arguments(f) for f in kinds if not f.name.startswith('_')}
  if kind == 'optimizer':
    return {'adamw': _attributes(root / 'optimizer.py', 'Optimizer')}
  files = sorted((root / f'{kind}s').glob('[a-z]*.py'))
  if kind == 'objective':
    return {p.stem: _attributes(p, 'Objective') for p in files}
  cores = [p for p in files if 'SIZES' in p.read_text(encoding='utf-8')]
  return {p.stem: _attributes(p, p.stem.title()) for p in cores}


def _body(path: pathlib.Path) -> list[ast.stmt]:
  return ast.parse(path.read_text(encoding='utf-8')).body


def _arguments(function: ast.FunctionDef) -> Knobs:
  pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
  return {arg.arg: _knob(arg.annotation, default) for arg, default in pairs}


def _attributes(path: pathlib.Path, class_name: str) -> Knobs:
  classes = [n for n in _body(path) if isinstance(n, ast.ClassDef) and n.name == class_name]
  nodes = [n for c in classes for n in c.body if isinstance(n, ast.AnnAssign)]
  fields = [n for n in nodes if not ast.unparse(n.annotation).startswith('ClassVar')]
  return {n.target.id: _knob(n.annotation, n.value) for n in fields if n.target.id != 'name'}


def _knob(annotation: ast.expr, default: ast.expr | None) -> tuple[type, Any]:
  types = {'int': int, 'float': float, 'str': str, 'bool': bool, 'dict': ConfigDict}
  name = ast.unparse(annotation).removesuffix(' | None')
  if name not in types:
    raise TypeError(f'a knob is of type {", ".join(types)} or one of these | None, not {name}')
  type_ = types[name]
  if type_ is ConfigDict:
    return type_, ConfigDict()
  return type_, default and ast.literal_eval(default)
