"""Whether an experiment is what it seems, before it costs anything.

python -m lmjax.check --config FILE.py[:ARGUMENT]
    tries on a small twin of it, on a CPU, what must hold of any experiment.
python -m lmjax.check resume --config FILE.py[:ARGUMENT] [--steps 12] [--kills 3]
    kills runs of it and takes them up, also on other devices, and compares.
"""

import os
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from lmjax import check, command, config, terminal
from lmjax.check import resume
from lmjax.errors import UserError

DEVICES = 4  # that a CPU is divided into, so that the strategy has something to do


def given() -> dict[str, Any]:
  if flags.FLAGS.config is None:
    raise UserError('name an experiment with --config FILE.py[:ARGUMENT]')
  return config.resolve(flags.FLAGS.config)


def oracles() -> None:
  c = given()
  jax.config.update('jax_platforms', 'cpu')
  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', DEVICES)
  failed = []
  for name, finding in check.examine(c):
    print(check.line(name, finding), flush=True)
    failed += [name] if finding.holds is False else []
  if failed:
    raise UserError(f'not all holds that should: {", ".join(failed)}')
  print(
    'all holds that should, of a small twin on a text of its own: the data, the tokenizer and the '
    'vocabulary of the run itself were not looked at (python -m lmjax.data show shows them)'
  )


def resumed() -> None:
  f, c = flags.FLAGS, given()
  if f.kills < 1:
    raise UserError(f'--kills={f.kills} must be at least 1')
  if f.steps < 4:
    raise UserError(f'--steps={f.steps} must be at least 4')
  if not resume.prove(c, f.steps, f.kills):
    sys.exit('lmjax: a run that is taken up is not the one that was never stopped: see above')
  print('a run that is taken up is the one that was never stopped')


if __name__ == '__main__':
  if '--help' in sys.argv:
    print(__doc__)
    sys.exit()
  config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py[:ARGUMENT].')
  if len(sys.argv) > 1 and sys.argv[1] != 'resume' and not sys.argv[1].startswith('-'):
    terminal.say(f'"{sys.argv[1]}" is neither `resume` nor a flag; flags begin with "--"')
    sys.exit(2)
  if sys.argv[1:2] == ['resume']:
    flags.DEFINE_integer('steps', 12, 'How long the runs are.')
    flags.DEFINE_integer('kills', 3, 'How often one is killed.')
    command.run(resumed, sys.argv[:1] + sys.argv[2:])
  else:
    command.run(oracles)
