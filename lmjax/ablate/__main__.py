"""Compares arms of an experiment:

python -m lmjax.ablate --config FILE.py[:ARG] --vary KEY=V1,V2 … --seeds N --workdir DIR
    runs each arm with each seed, and writes report.html, report.md and report.json into DIR.
    Without --vary the arms are those of the file's sweep().  The same command again goes on
    where it was stopped, and with more seeds or arms it adds them.  --config.KEY=VALUE is for all.

    --launch print prints the commands that are left, for other machines, and --launch none
    reports what has ended by now.

KEY is one of the config, `variant` (the argument of the file), or `label` (a name that changes
nothing, as of two arms that should not differ).
"""

import contextlib
import shlex
import sys

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from lmjax import ablate, command, hardware
from lmjax.ablate import budget
from lmjax.errors import UserError
from lmjax.terminal import say

LAUNCH = ('here', 'print', 'none')


def main() -> None:
  f = flags.FLAGS
  if f.config is None:
    raise UserError('name an experiment with --config FILE.py[:ARGUMENT]')
  if not f.workdir:
    raise UserError('name a directory for the runs and the report with --workdir DIR')
  if f.parallel < 1:
    raise UserError(f'--parallel={f.parallel} must be at least 1')
  if not 0 < f.alpha < f.power < 1:
    raise UserError(f'--alpha={f.alpha} must be above 0 and below --power={f.power}, that below 1')
  if f.plan:
    hardware.prepare([f.plan])
  else:
    jax.config.update('jax_platforms', 'cpu')  # what is there is for the runs
  spec = config_flags.get_config_filename(f['config'])
  plain = lambda x: x.to_dict() if isinstance(x, ConfigDict) else x
  values = config_flags.get_override_values(f['config'])
  given = {key: plain(x) for key, x in values.items()}
  vmap = 'lr' if f.vmap_lr else 'seeds' if f.vmap_seeds else ''
  how = f.seeds, f.match, f.may_move, vmap, f.parallel, given
  made = ablate.Ablation(spec, f.workdir, f.vary, *how)
  if f.launch == 'none' and not made.begun:
    raise UserError(f'{made.directory} holds no ablation yet')
  if f.plan and made.match == 'time' and not made.begun:
    raise UserError('--match=time is measured, and nothing is run with --plan')
  if f.launch == 'here' and not f.plan:
    assert made.places  # a machine that does not divide is said before data are made
  with contextlib.redirect_stdout(sys.stderr if f.launch == 'print' else sys.stdout):
    print('\n'.join(made.prove()), flush=True)
  made.check_metric(f.metric)
  if f.plan:
    entries = budget.plans(made.arms, f.plan)
    print('\n'.join(budget.lines(made.arms, entries, f.seeds, f.price_per_hour)))
    return
  made.keep()
  left = made.jobs()
  if f.launch == 'print':
    print(''.join(job.command + '\n' for job in left), end='')
    return
  try:
    if f.launch == 'here':
      work(made, len(made.runs) - sum(len(job.runs) for job in left))
  except Exception:  # where one arm ends with a mistake, the others have something to say
    try:
      report(made)
    except UserError as e:
      say(str(e))
    raise
  report(made)


def work(made: ablate.Ablation, done: int) -> None:
  if left := len(made.runs) - done:
    where = made.directory / 'runs' / '*' / '*.log'
    print(f'{left} runs are left, {made.parallel} at a time; what they print: {where}', flush=True)
  for number, run in enumerate(made.work(), start=done + 1):
    status, why = run.outcome()
    said = f'{run.arm.name} seed {run.seed} {status}' + (f': {why}' if why else '')
    print(f'{number} of {len(made.runs)}: {said}', flush=True)


def report(made: ablate.Ablation) -> None:
  f = flags.FLAGS
  study = made.study(
    shlex.join(['python', '-m', 'lmjax.ablate', *sys.argv[1:]]),
    f.metric,
    f.margin,
    f.alpha,
    f.power,
    f.price_per_hour,
  )
  for one in study['comparisons']:
    print(f'{one["arms"][1]} beside {one["arms"][0]}: {one["verdict"]}')
  print(f'{study["metric"]}; the whole is in {made.directory}/report.html')


if __name__ == '__main__':
  if '--help' in sys.argv:
    print(__doc__)
  config_flags.DEFINE_config_file('config', None, 'The experiment: FILE.py[:ARGUMENT].')
  flags.DEFINE_multi_string('vary', [], 'KEY=V1,V2: a key and its values, one an arm.')
  flags.DEFINE_integer('seeds', 3, 'How many seeds each arm is run with.')
  flags.DEFINE_string('match', '', 'What arms get as much of: steps, tokens, flops or time.')
  flags.DEFINE_list('may_move', [], 'Keys that may differ because a variant says so.')
  flags.DEFINE_bool('vmap_seeds', False, 'All seeds of an arm in one compiled program.')
  flags.DEFINE_bool('vmap_lr', False, 'And those of arms that differ in optimizer.lr alone.')
  flags.DEFINE_string('workdir', '', 'Where runs and report are kept.')
  flags.DEFINE_string('plan', '', 'Run nothing: say what it needs on a topology such as h100:1.')
  flags.DEFINE_string('metric', '', 'What is compared, such as eval/validation/xent.')
  flags.DEFINE_float('margin', None, 'Differences below it are of no interest.', lower_bound=0)
  flags.DEFINE_float('alpha', 0.05, 'How often a difference may be called where there is none.')
  flags.DEFINE_float('power', 0.8, 'How often one as large as the margin is to be found.')
  flags.DEFINE_float('price_per_hour', None, 'Of this machine, in any currency.', lower_bound=0)
  flags.DEFINE_integer('parallel', 1, 'How many runs share this machine.')
  flags.DEFINE_enum('launch', 'here', LAUNCH, 'Run here, print what is left, or only report.')
  command.run(main)
