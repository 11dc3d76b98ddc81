"""Trains:  python -m lmjax.main --config experiments/quickstart.py --workdir /tmp/run

A killed run goes on where its last checkpoint was when the same command is given again.
Every knob can be set on the command line, as --config.optimizer.lr=3e-4; lmjax/config.py has them.
"""

from absl import flags
from ml_collections import config_flags

from lmjax import command, config


def main() -> None:
  if flags.FLAGS.parent:
    command.end_with(flags.FLAGS.parent)
  if flags.FLAGS.config is None:
    raise config.UserError('name an experiment with --config FILE.py[:ARGUMENT]')
  if not flags.FLAGS.workdir:
    raise config.UserError('name a directory for the run with --workdir DIR')
  resolved, workdir = config.resolve(flags.FLAGS.config), flags.FLAGS.workdir
  from lmjax import record

  asked = {'config': resolved, 'workdir': workdir}
  with command.joined(lambda: record.flatten({**record.software(), **asked})):
    import jax

    from lmjax import train  # imports JAX, which a wrong config need not wait for

    if flags.FLAGS.debug:
      jax.config.update('jax_disable_jit', True)
    train.run(resolved, workdir, flags.FLAGS.profile)


if __name__ == '__main__':
  command.keep_freed_memory()
  config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py[:ARGUMENT].')
  flags.DEFINE_string('workdir', '', 'Where the run is kept; the same again resumes it.')
  flags.DEFINE_string('profile', '', 'Trace the steps FIRST:LAST into the workdir.')
  flags.DEFINE_bool('debug', False, 'Nothing is compiled: every array can be looked at.')
  flags.DEFINE_integer('parent', None, 'Stop, saved, when this process, which began it, is gone.')
  command.define_process_flags()
  command.run(main)
