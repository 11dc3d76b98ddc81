"""A run in a notebook: trained in a process of its own, its curve drawn as it falls."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from lmjax import command, config, jsonio, record
from lmjax import workdir as workdir_lib
from lmjax.errors import UserError

POLL = 1.0  # seconds


def train(
  spec: str, workdir: str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """What lmjax.main does with FILE.py[:ARGUMENT] and these values of keys, shown as it goes on.

  The process has the accelerator for itself, and gives it back.  What it prints is in
  <workdir>.log.  A notebook's interrupt stops it with all it has done saved; the same call goes on.

  Returns what result.json holds.

  Raises:
    UserError: the run has not come to its end; with what it said last.
  """
  from IPython import display  # which a notebook has, and a training job need not

  directory = workdir_lib.on_disk(workdir)
  directory.parent.mkdir(parents=True, exist_ok=True)
  own = [f'--workdir={directory}', f'--parent={os.getpid()}']
  argv = [sys.executable, '-m', 'lmjax.main', *config.flags_of(spec, overrides or {}), *own]
  file = directory.with_name(f'{directory.name}.log')
  shown, drawn = display.display(display.Markdown('preparing …'), display_id=True), 0
  if shown is None:
    raise UserError('live.train draws in a notebook, and here is none: lmjax.train.run trains')
  with (
    file.open('a') as log,
    command.child(argv, saves=True, stdout=log, stderr=subprocess.STDOUT) as process,
  ):
    while process.poll() is None:
      time.sleep(POLL)
      lines = record.lines(directory, 'metrics.jsonl')
      if len(lines) > drawn:
        drawn = len(lines)
        shown.update(display.SVG(curve(lines)))
  if process.returncode:
    raise UserError('\n'.join(file.read_text(errors='replace').splitlines()[-12:]))
  shown.update(display.SVG(curve(record.lines(directory, 'metrics.jsonl'))))
  return jsonio.read(directory / 'result.json')


def curve(lines: list[dict[str, Any]]) -> str:
  """An SVG of the loss in training and on every evaluation set, of the lines of metrics.jsonl."""
  figure = Figure(figsize=(6, 3), layout='constrained')
  axes = figure.add_subplot(xlabel='step', ylabel='loss, nats')
  losses = sorted({key for line in lines for key in line if key.endswith('/loss')})
  for key in losses:
    points = [(line['step'], line[key]) for line in lines if key in line]
    name = key.removesuffix('/loss').removeprefix('eval/')
    axes.plot(*zip(*points, strict=True), 'o-' if key.startswith('eval/') else '-', label=name)
  if losses:
    axes.legend()
  text = io.StringIO()
  figure.savefig(text, format='svg')
  return text.getvalue()
