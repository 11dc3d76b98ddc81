"""Planted bugs, one after the other, and what catches each: an oracle of lmjax.check, or a test.

python tests/benchmarks/mutations.py [--only WORD] [--markdown]

Each is one edit of the source, in a copy of it.  First the oracles are tried on the experiment it
belongs to, of which all hold without the bug, and then, where they all hold with it, the tests of a
file.  --only takes those with this word in their names; --markdown prints the table of README.md.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXPERIMENT = """from lmjax import config
def get_config(name):
  c = config.base(objective='clm' if 'gpt' in name else 'mlm', tokenizer='bytes')
  c.model.update(depth=2, dim=32, heads=4, scan=False)
  c.length = 64
  if name == 'gpt':
    c.optimizer.weight_decay, c.sharding.strategy = 0.1, 'fsdp'
  elif name == 'gpt_documents':
    c.objective.separate_documents = True
  else:
    c.objective.next_sentence = True
    c.model.update(dropout=0.1, attention_dropout=0.1)
    c.model.norm_position = 'post'
  return c
"""


class Bug(NamedTuple):
  file: str
  right: str
  wrong: str
  experiment: str  # an argument of EXPERIMENT
  test: str = ''  # what is run where every oracle holds


BUGS = {
  'targets are the tokens themselves': Bug(
    'objectives/clm.py', "'targets': tokens[:, 1:]", "'targets': tokens[:, :-1]", 'gpt'
  ),
  'targets are two ahead': Bug(
    'objectives/clm.py',
    "'targets': tokens[:, 1:]",
    "'targets': np.roll(tokens[:, 1:], -1, axis=1)",
    'gpt',
  ),
  'windows overlap by one': Bug(
    'objectives/clm.py',
    'starts = indices * self.length',
    'starts = indices * (self.length - 1)',
    'gpt',
  ),
  'padding of the last window is trained on': Bug(
    'objectives/clm.py', 'weights[row, counts[row] :] = 0', 'weights[row, counts[row] :] = 1', 'gpt'
  ),
  'the epochs are cut at the same places': Bug(
    'objectives/clm.py',
    'corrupt.epoch_key(self.seed, e) %',
    '0 * corrupt.epoch_key(self.seed, e) %',
    'gpt',
    'pack',
  ),
  'the mask is upside down': Bug(
    'objectives/mlm.py', 'corrupt.replace(clean, chosen,', 'corrupt.replace(clean, ~chosen,', 'bert'
  ),
  'targets are taken from the corrupted text': Bug(
    'objectives/mlm.py',
    "'targets': clean[",
    "'targets': corrupt.replace(clean, chosen, mask, self.ordinary, shares, noise)[",
    'bert',
  ),
  'special tokens are masked too': Bug(
    'objectives/mlm.py',
    'candidates = np.take(self.is_ordinary, clean)',
    'candidates = clean != self.tokenizer.pad',
    'bert',
    'mlm',
  ),
  'dynamic masks are static': Bug(
    'objectives/mlm.py',
    'epochs if o.dynamic else np.zeros_like(epochs)',
    'np.zeros_like(epochs)',
    'bert',
    'mlm',
  ),
  'next and not next are exchanged': Bug(
    'objectives/mlm.py', 'place, label\n', 'place, 1 - label\n', 'bert', 'mlm'
  ),
  'the pooled place is that after [CLS]': Bug(
    'objectives/mlm.py',
    'pair_targets[row, slot] = place, label',
    'pair_targets[row, slot] = place + 1, label',
    'bert',
    'mlm',
  ),
  'both halves are of one type': Bug(
    'objectives/mlm.py',
    'types[row, place + n_a : place + n] = 1',
    'types[row, place + n_a : place + n] = 0',
    'bert',
    'mlm',
  ),
  'all that is predicted is masked': Bug(
    'objectives/mlm.py', '(o.mask_share, o.random_share)', '(1.0, 0.0)', 'bert'
  ),
  'documents are not told apart': Bug(
    'data/pack.py',
    '1 + np.cumsum(opens, axis=1)',
    '1 + 0 * np.cumsum(opens, axis=1)',
    'gpt_documents',
  ),
  'attention drops nothing': Bug(
    'models/attention.py', 'if self.dropout and train else None', 'if False else None', 'bert'
  ),
  'positions do not begin anew': Bug(
    'data/pack.py', '(places - first).astype', '(places + 0 * first).astype', 'gpt_documents'
  ),
  'every epoch has the same order': Bug(
    'data/loader.py',
    'epoch_key(self.seed, e) for e in epochs',
    'epoch_key(self.seed, 0 * e) for e in epochs',
    'gpt',
    'loader',
  ),
  'the last rows of an evaluation are left out': Bug(
    'data/loader.py', 'count = -(-n // batch)', 'count = n // batch or 1', 'gpt', 'loader'
  ),
  'token 0 costs nothing': Bug(
    'models/heads.py',
    '(x_BL * weights_BL).sum(), weight)',
    '(x_BL * weights_BL * (targets_BL > 0)).sum(), weight)',
    'gpt',
  ),
  'loss weights are forgotten': Bug(
    'models/heads.py',
    '(x_BL * weights_BL).sum(), weight)',
    '(x_BL + 0 * weights_BL).sum(), weight)',
    'bert',
  ),
  'rows that no token has are likely too': Bug(
    'models/heads.py', '  if classes < logits_BLV.shape[-1]:\n', '  if False:\n', 'gpt'
  ),
  'the loss of a device is taken for that of all': Bug(
    'models/heads.py', 'targets_BL, weights_BL).sum(axis=0)', 'targets_BL, weights_BL)[0]', 'gpt'
  ),
  'the tied table is transposed upside down': Bug(
    'models/layers.py',
    'table.T, 1, jnp.float32)',
    'table[::-1].T, 1, jnp.float32)',
    'gpt',
    'contract',
  ),
  "a row's gradient is its last one": Bug(
    'models/layers.py', '.at[ids].add(d', '.at[ids].set(d', 'gpt'
  ),
  'the future is seen by one place': Bug(
    'models/attention.py', 'distance_LS >= (0 if', 'distance_LS >= (-1 if', 'gpt'
  ),
  'a BERT looks back only': Bug(
    'objectives/mlm.py', 'Mask(causal=False, lengths_B=', 'Mask(causal=True, lengths_B=', 'bert'
  ),
  'documents see each other': Bug(
    'objectives/clm.py', 'segments_BL=segments_BL)', 'segments_BL=None)', 'gpt_documents'
  ),
  'padding is seen': Bug(
    'objectives/mlm.py', 'lengths_B=(segments_BL > 0).sum(axis=1))', 'lengths_B=None)', 'bert'
  ),
  'the softmax is over the queries': Bug(
    'models/attention.py', 'jax.nn.softmax(logits)', 'jax.nn.softmax(logits, axis=-2)', 'gpt'
  ),
  'logits of attention are not scaled': Bug(
    'models/attention.py', ' * h**-0.5', '', 'gpt', 'attention'
  ),
  'there is no residual stream': Bug(
    'models/transformer.py', 'y_BLD = x_BLD + h_BLD', 'y_BLD = 0 * x_BLD + h_BLD', 'gpt', 'golden'
  ),
  'a part gets no gradient': Bug(
    'models/transformer.py',
    'h_BLD = part(h_BLD)',
    'h_BLD = jax.lax.stop_gradient(part(h_BLD))',
    'gpt',
  ),
  'dropout is on in evaluation': Bug(
    'models/transformer.py',
    '(self.dropout, deterministic=not train)',
    '(self.dropout, deterministic=False)',
    'bert',
  ),
  'noise is the same in every step': Bug(
    'step.py', 'jax.random.fold_in(state.rng, state.step)', 'state.rng', 'bert'
  ),
  'a mean of means': Bug(
    'step.py',
    'of_part(*part, params, rng, weights)), None',
    'of_part(*part, params, rng, {k: micro_batches * w for k, w in '
    '_positive(weights_of(params, part[1])).items()})), None',
    'bert',
  ),
  'micro-batches are not added up': Bug(
    'step.py',
    'jax.tree.map(jnp.add, carry, of_part',
    'jax.tree.map(lambda _, new: new, carry, of_part',
    'gpt',
  ),
  'norms decay': Bug(
    'optimizer.py',
    'decayed = _map(_is_matrix, axes)',
    'decayed = _map(lambda names: True, axes)',
    'gpt',
  ),
  'the learning rate is that of the step before': Bug(
    'optimizer.py',
    'jnp.asarray(count, jnp.float32) + 1',
    'jnp.asarray(count, jnp.float32)',
    'gpt',
    'optimizer',
  ),
  'the last step is not at the final rate': Bug(
    'optimizer.py',
    '(n - start) / (steps - start)',
    '(n - start) / (steps + 1 - start)',
    'gpt',
    'optimizer',
  ),
}


def caught(bug: Bug, scratch: pathlib.Path) -> str:
  """The oracle or test that fails; '' where none does."""
  source = (ROOT / 'lmjax' / bug.file).read_text()
  assert bug.right in source, f'{bug.right} is not in {bug.file}'
  shutil.copytree(ROOT / 'lmjax', scratch / 'lmjax', dirs_exist_ok=True)
  (scratch / 'lmjax' / bug.file).write_text(source.replace(bug.right, bug.wrong))
  (scratch / 'experiment.py').write_text(EXPERIMENT)
  environment = os.environ | {'PYTHONPATH': str(scratch), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  run = lambda *words: subprocess.run(
    [sys.executable, '-W', 'ignore', '-m', *words],
    cwd=scratch,
    env=environment,
    capture_output=True,
    text=True,
  )
  got = run('lmjax.check', f'--config={scratch}/experiment.py:{bug.experiment}')
  failed = re.findall(r'^FAILS  (\w+)', got.stdout, re.M)
  if failed:
    return ', '.join(f'`{name}`' for name in failed)
  if got.returncode:  # no oracle has said what is wrong
    print(got.stderr, file=sys.stderr)
  if got.returncode or not bug.test:
    return ''
  for name in ('tests', 'experiments', 'setup.cfg', 'pyproject.toml', 'README.md'):
    if not (scratch / name).exists():
      (scratch / name).symlink_to(ROOT / name)
  test = f'tests/{bug.test}_test.py'
  got = run(
    'pytest', '-q', '-x', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-o', 'addopts=', test
  )
  names = re.findall(r'^FAILED (\S+)', got.stdout, re.M)
  return f'`{names[0]}`' if names else ''


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--only', default='')
  parser.add_argument('--markdown', action='store_true')
  asked = parser.parse_args()
  found = {}
  for experiment in sorted({bug.experiment for bug in BUGS.values()}):
    with tempfile.TemporaryDirectory() as scratch:
      nothing = Bug('step.py', '\n', '\n', experiment)
      by = caught(nothing, pathlib.Path(scratch))
    assert not by, f'without a bug, {experiment}: {by}'
  for name in (name for name in BUGS if asked.only in name):
    with tempfile.TemporaryDirectory() as scratch:
      found[name] = caught(BUGS[name], pathlib.Path(scratch))
    print(f'{name}: {found[name] or "NOT CAUGHT"}', file=sys.stderr, flush=True)
  missed = [name for name, by in found.items() if not by]
  if asked.markdown:
    print('| planted bug | in | caught by |\n|---|---|---|')
    print(
      '\n'.join(
        f'| {name} | `{BUGS[name].file}` | {by or "nothing"} |' for name, by in found.items()
      )
    )
  else:
    result = {'bugs': len(found), 'caught': len(found) - len(missed), 'missed': missed, 'by': found}
    print(json.dumps(result, indent=2))
  sys.exit(bool(missed))


if __name__ == '__main__':
  main()
