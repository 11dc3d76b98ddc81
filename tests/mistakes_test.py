"""Wrong input gets one sentence and exit code 2, quickly, and leaves nothing behind."""

import gzip
import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from tests import xla_flags

TEXT = 'A sentence of a text. Another one follows it. ' * 40


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp('files')
  (root / 'good.txt').write_text(TEXT)
  (root / 'good2.txt').write_text(TEXT)
  (root / 'empty.txt').write_text('')
  (root / 'blank.txt').write_text(' \n \n')
  (root / 'short.txt').write_text('Short.')
  (root / 'binary.txt').write_bytes(b'\x7fELF\x00\x00' * 100)
  (root / 'latin1.txt').write_bytes('Ein schöner Text. '.encode('latin-1') * 50)
  (root / 'line.jsonl').write_text(json.dumps({'text': 'x ' * 25_000_000}))
  (root / 'bad.jsonl').write_text('{"text": "fine"}\n{"text": \n')
  (root / 'key.jsonl').write_text('{"body": "no such key"}\n')
  (root / 'bad.parquet').write_bytes(b'PAR1 this is no Parquet file PAR1')
  (root / 'cut.txt.gz').write_bytes(gzip.compress(TEXT.encode())[:-20])
  (root / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\n')
  (root / 'nomask.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n##b\n')
  (root / 'garbage.model').write_bytes(b'garbage' * 100)
  (root / 'afile').write_text('not a directory')
  (root / 'syntax.py').write_text('def get_config(:\n')
  (root / 'bytes.py').write_text(
    'from lmjax import config\n'
    'def get_config(objective):\n'
    "  c = config.base(objective=objective, tokenizer='bytes')\n"
    "  c.model.size = 'bert_tiny'\n"
    '  return c\n'
  )
  (root / 'wordpiece.py').write_text(
    'from lmjax import config\n'
    'def get_config(objective):\n'
    "  c = config.base(objective=objective, tokenizer='wordpiece')\n"
    f"  c.tokenizer.update(path='{root}/vocab.txt', vocab_size=0)\n"
    "  c.model.size = 'bert_tiny'\n"
    '  return c\n'
  )
  return root


CLM = 'experiments/quickstart.py'
BERT = 'experiments/quickstart.py:bert'

# name -> (experiment, overrides, what the sentence says); {} is the directory of files.
MISTAKES = {
  'no config file': ('nowhere.py', {}, 'nowhere.py'),
  'syntax error': ('{}/syntax.py', {}, 'line 1'),
  'unknown variant': ('experiments/quickstart.py:brt', {}, 'bert'),
  'typo at the top': (CLM, {'step': 3}, 'steps'),
  'typo of a section': (CLM, {'modle.dim': 3}, 'model'),
  'typo in a section': (CLM, {'model.dmi': 3}, 'dim'),
  'float for int': (CLM, {'steps': 7.5}, 'steps'),
  'word for float': (CLM, {'optimizer.lr': 'fast'}, 'fast'),
  'nan': (CLM, {'optimizer.lr': 'nan'}, 'lr'),
  'negative': (CLM, {'batch': -4}, 'batch'),
  'no steps': (CLM, {'steps': 0}, 'steps'),
  'negative seed': (CLM, {'seed': -1}, 'seed'),
  'negative window': (CLM, {'model.window': -1}, 'window'),
  'negative evaluation batches': (CLM, {'evaluate.batches': -1}, 'evaluate.batches'),
  'final rate that nothing reads': (
    CLM,
    {'optimizer.schedule': 'constant', 'optimizer.final_lr': 0.1},
    'read by nothing',
  ),
  'unknown objective': (CLM, {'objective.name': 'clam'}, 'clm'),
  'unknown optimizer': (CLM, {'optimizer.name': 'adamq'}, 'adam'),
  'unknown schedule': (CLM, {'optimizer.schedule': 'cosin'}, 'cosine'),
  'unknown positions': (CLM, {'model.positions': 'rotery'}, 'rotary'),
  'unknown size': (CLM, {'model.size': 'gpt2_smal'}, 'gpt2_small'),
  'unknown strategy': (CLM, {'sharding.strategy': 'replicat'}, 'replicate'),
  'unknown masking': (BERT, {'objective.masking': 'words'}, 'word'),
  'key that nothing reads': (BERT, {'objective.pair_length': 9}, 'read by nothing'),
  'kind of document that nothing reads': (CLM, {'data.document': 'line'}, 'read by nothing'),
  'text key that nothing reads': (
    CLM,
    {'data.train': '{}/good.txt', 'data.text_key': 'body'},
    'read by nothing',
  ),
  'trainer of a vocabulary that is given': (
    '{}/wordpiece.py:mlm',
    {'data.train': '{}/good.txt', 'tokenizer.sample_megabytes': 2.0},
    'read by nothing',
  ),
  'optimizer key that nothing reads': (
    CLM,
    {'optimizer.name': 'sgd', 'optimizer.b1': 0.9},
    'takes no b1',
  ),
  'heads do not divide': (CLM, {'model.heads': 5}, 'heads = 5'),
  'kv heads do not divide': (CLM, {'model.kv_heads': 3}, 'kv_heads = 3'),
  'micro-batches do not divide': (
    CLM,
    {'data.train': '{}/good.txt', 'micro_batches': 7},
    'into 7 micro-batch(es) on 2 device(s): try',
  ),
  'batch does not divide over devices': (CLM, {'batch': 3}, 'try 2 or 4'),
  'mesh of the wrong size': (
    CLM,
    {'data.train': '{}/good.txt', 'sharding.data': 3},
    'does not use the 2 device(s)',
  ),
  'axis that the strategy does not use': (
    CLM,
    {'data.train': '{}/good.txt', 'sharding.model': 2},
    'uses no such axis',
  ),
  'optimizer state does not divide over devices': (
    CLM,
    {
      'data.train': '{}/good.txt',
      'sharding.strategy': 'zero',
      'model.positions': 'learned',
      'model.heads': 3,
      'model.dim': 99,
    },
    '"embed" of 99 does not divide over 2 devices',
  ),
  'too many parameters whole': (
    CLM,
    {
      'data.train': '{}/good.txt',
      'sharding.strategy': 'tensor',
      'sharding.model': 2,
      'sharding.max_unsharded': 0.0,
    },
    'more than sharding.max_unsharded = 0.0',
  ),
  'heads do not divide over devices': (
    CLM,
    {
      'data.train': '{}/good.txt',
      'sharding.strategy': 'tensor',
      'sharding.model': 2,
      'model.heads': 3,
      'model.dim': 96,
    },
    '"heads" of 3 does not divide over 2 devices',
  ),
  'warm-up longer than the run': (CLM, {'optimizer.warmup_steps': 10**6}, 'optimizer.warmup_steps'),
  'length beyond the positions': (CLM, {'model.max_length': 8}, 'max_length = 8'),
  'dropout of one': (CLM, {'model.dropout': 1.0}, 'dropout'),
  'missing file': (CLM, {'data.train': '{}/none.txt'}, 'none.txt'),
  'glob without a match': (CLM, {'data.train': '{}/*.none'}, '*.none'),
  'missing evaluation file': (CLM, {'data.eval.validation': '{}/none.txt'}, 'none.txt'),
  'empty file': (CLM, {'data.train': '{}/empty.txt'}, 'empty.txt'),
  'blank file': (CLM, {'data.train': '{}/blank.txt'}, 'blank.txt'),
  'corpus shorter than a window': (
    '{}/bytes.py:clm',
    {'data.train': '{}/short.txt'},
    'less than one window',
  ),
  'binary file': (CLM, {'data.train': '{}/binary.txt'}, 'binary.txt'),
  'invalid UTF-8': (CLM, {'data.train': '{}/latin1.txt'}, 'latin1.txt'),
  'a line of 50 MB': (CLM, {'data.train': '{}/line.jsonl'}, 'line.jsonl'),
  'broken JSON': (CLM, {'data.train': '{}/bad.jsonl'}, 'bad.jsonl'),
  'JSON without the key': (CLM, {'data.train': '{}/key.jsonl'}, 'text'),
  'broken Parquet': (CLM, {'data.train': '{}/bad.parquet'}, 'bad.parquet'),
  'truncated gzip': (CLM, {'data.train': '{}/cut.txt.gz'}, 'cut.txt.gz'),
  'unknown document kind': (CLM, {'data.document': 'lines'}, 'line'),
  'bad slice': (CLM, {'data.train': '{}/good.txt#[:90]'}, '%'),
  'vocabulary too small': (CLM, {'data.train': '{}/good.txt', 'tokenizer.vocab_size': 10}, '10'),
  'vocabulary too large': (
    CLM,
    {'data.train': '{}/good.txt', 'tokenizer.vocab_size': 50_000},
    '50000',
  ),
  'tokenizer file missing': (
    CLM,
    {'tokenizer.path': '{}/none.model', 'tokenizer.model_type': 'bpe'},
    'none.model',
  ),
  'tokenizer file is garbage': (
    CLM,
    {'tokenizer.path': '{}/garbage.model', 'tokenizer.model_type': 'bpe'},
    'garbage.model',
  ),
  'one document for next_sentence': (
    '{}/bytes.py:mlm',
    {'data.train': '{}/good.txt', 'objective.next_sentence': True},
    'two documents',
  ),
  'best by a metric that nothing reports': (
    '{}/bytes.py:clm',
    {'data.train': '{}/good.txt', 'checkpoint.keep_best': 'eval/validation/los'},
    'eval/validation/loss',
  ),
  'cache is a file': (
    CLM,
    {'data.train': '{}/good.txt', 'cache': '/dev/null/cache'},
    'cannot keep anything in /dev/null/cache',
  ),
  'workdir is a file': (CLM, {'workdir': '{}/afile'}, 'afile'),
  'workdir cannot be made': (CLM, {'workdir': '/proc/none/run'}, '/proc/none/run'),
  'warm start from nowhere': (CLM, {'init_from': '{}/none'}, 'none'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_one_sentence_and_exit_code_2(files, tmp_path, name):
  experiment, overrides, said = MISTAKES[name]
  fill = lambda x: x.replace('{}', str(files)) if isinstance(x, str) else x
  overrides = {key: fill(value) for key, value in overrides.items()}
  workdir = pathlib.Path(overrides.pop('workdir', tmp_path / 'run'))
  small = {'cache': tmp_path / 'cache'}
  if name != 'missing evaluation file' and 'data.train' in overrides:
    small['data.eval.validation'] = files / 'good2.txt'
  command = [sys.executable, '-W', 'ignore', '-m', 'lmjax.main', '--config', fill(experiment)]
  flags = [f'--config.{k}={v}' for k, v in {**small, **overrides}.items()]
  environment = {'XLA_FLAGS': xla_flags(2), 'JAX_PLATFORMS': 'cpu'}
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  got = subprocess.run(
    [
      *command,
      '--workdir',
      str(workdir),
      *([] if experiment.endswith('.py') and experiment != CLM else flags),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | environment,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert got.returncode == 2, got.stderr[-2000:]
  assert 'Traceback' not in got.stderr
  sentence = got.stderr.strip().splitlines()[-1]
  assert sentence.startswith('lmjax: ')
  assert said in sentence
  assert len(got.stderr.strip().splitlines()) == 1, got.stderr
  assert not (workdir / 'config.json').exists()
  assert not list(tmp_path.rglob('*.tmp'))
  # Not by the clock, which other tests hold up.
  assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


RUN = ['main', '--config', CLM, '--workdir', '/tmp/x']


@pytest.mark.parametrize(
  ('command', 'said'),
  [
    (['main', '--help'], '--workdir'),
    (['main'], '--config'),
    (['main', '--config', CLM], '--workdir'),
    (['main', '--config', CLM, '--workdir', '/tmp/x', 'config.steps=3'], 'config.steps=3'),
    (['main', '--cfg', CLM], 'cfg'),
    ([*RUN, '--processes=2'], 'all three or none'),
    ([*RUN, '--processes=2', '--process=0'], 'all three or none'),
    ([*RUN, '--coordinator=localhost', '--processes=2', '--process=0'], 'is not HOST:PORT'),
    ([*RUN, '--coordinator=a:99999', '--processes=2', '--process=0'], 'is not HOST:PORT'),
    ([*RUN, '--coordinator=a:1', '--processes=2', '--process=2'], 'is not one of 0 to 1'),
    ([*RUN, '--coordinator=a:1', '--processes=0', '--process=0'], 'must be at least 1'),
    ([*RUN, '--coordinator=a:1', '--processes=two', '--process=0'], '--processes'),
    (['evaluate', '--workdir=/tmp/x', '--process=1'], 'all three or none'),
    (['generate', '--workdir=/tmp/x', '--process=1'], 'all three or none'),
    (['evaluate'], '--workdir'),
    (['evaluate', '--workdir', '/nowhere'], 'no run in /nowhere'),
    (['generate', '--workdir', '/nowhere'], 'no run in /nowhere'),
    (['generate', '--workdir', '/nowhere', '--top_k', 'many'], 'top_k'),
    (['record', 'diff', '/nowhere', '/nowhere'], 'no run in /nowhere'),
    (['data', 'show'], '--config'),
    (['data', 'show', '--config', CLM, '--rows=0'], '--rows=0 must be at least 1'),
    (['data', 'show', '--config', CLM, '--rows=x'], '--rows=x is no whole number\n'),
    (['data', 'show', '--config', CLM, '--html=/nowhere/x.html'], 'no directory /nowhere for'),
    (['data', 'show', '--config', CLM, '--html=x.py'], 'does not end in .html'),
    (['data', 'build', '--config', CLM, '--rows=3'], "Unknown command line flag 'rows'"),
    (['data', '--help'], 'build|show'),
    (['record', '--help'], 'diff'),
    (['data', 'shew', '--config', CLM], 'show'),
    (['check', 'resum', '--config', CLM], '"resum" is neither `resume` nor a flag'),
  ],
  ids=lambda x: ' '.join(x) if isinstance(x, list) else '',
)
def test_commands(command, said):
  module, *arguments = command
  got = subprocess.run(
    [sys.executable, '-W', 'ignore', '-m', f'lmjax.{module}', *arguments],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert got.returncode == (0 if '--help' in command else 2), got.stderr
  assert said in got.stdout + got.stderr
  assert 'Traceback' not in got.stderr
