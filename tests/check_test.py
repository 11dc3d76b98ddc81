"""The oracles hold of what is right, and each of them is seen to fail of what is not."""

import itertools
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmjax import check, config, errors, optimizer, train
from lmjax.check import twin
from lmjax.data import corrupt, pack
from lmjax.metrics import Mean
from lmjax.models import layers, shards, transformer
from lmjax.models.attention import Mask
from lmjax.models.positions import Learned
from lmjax.objectives import clm
from tests.benchmarks import mutations
from tests.train_test import as_file

# What the experiments of experiments/, which have a test of their own, leave out.
OTHERS = {
  'documents apart': (
    'clm',
    {
      'objective.separate_documents': True,
      'objective.tied': False,
      'objective.label_smoothing': 0.1,
      'objective.z_loss': 1e-3,
      'sharding.strategy': 'tensor',
    },
  ),
  'packed pairs with static spans': (
    'mlm',
    {
      'objective.sentence_order': True,
      'objective.pairs_per_row': 4,
      'objective.pair_length': 24,
      'objective.masking': 'span',
      'objective.dynamic': False,
      'objective.dupe_factor': 2,
      'model.positions': 'relative',
      'model.qk_norm': True,
      'model.initializer': 'fan_in',
      'sharding.strategy': 'sequence',
    },
  ),
}


@pytest.mark.parametrize('name', OTHERS)
def test_all_oracles_hold(tiny, name):
  objective, own = OTHERS[name]
  findings = dict(check.examine(tiny(objective, **own)))
  assert findings.keys() == check.ORACLES.keys()
  failures = [check.line(*pair) for pair in findings.items() if pair[1].holds is False]
  assert not failures, '\n'.join(failures)


def test_options_that_a_compiler_does_not_know_are_left_out(monkeypatch):
  assert twin.quickly() is twin.QUICKLY
  monkeypatch.setitem(twin.QUICKLY, 'xla_cpu_flag_of_another_version', True)
  assert twin.quickly.__wrapped__() is None


def test_what_hides_all_tokens_cannot_be_learned_by_heart(tiny):
  hidden = {'rate': 1.0, 'mask_share': 1.0, 'random_share': 0.0}
  made = twin.of(tiny('mlm', **{f'objective.{key}': x for key, x in hidden.items()}))
  assert check.ORACLES['by_heart'](made).holds is None


# ------------------------------------------------------------------------------- planted mistakes


def wrapped(made, change):
  """`made` as a method or function whose result is changed."""
  return lambda *args, **kwargs: change(made(*args, **kwargs), *args)


def a_generator_is_shared(patch):
  calls, keys = itertools.count(), corrupt.keys
  patch.setattr(corrupt, 'keys', lambda seed, i, epochs: keys(seed, i, epochs + next(calls)))


def the_letter_a_weighs_nothing(patch):
  drop = lambda batch, *_: (
    batch | {'weights': batch['weights'] * (batch['targets'] != 5 + ord('a'))}
  )
  patch.setattr(clm.Windows, '__call__', wrapped(clm.Windows.__call__, drop))


def targets_are_not_shifted(patch):
  same = lambda batch, *_: batch | {'targets': batch['tokens']}
  patch.setattr(clm.Windows, '__call__', wrapped(clm.Windows.__call__, same))


def the_mask_is_upside_down(patch):
  replace = corrupt.replace
  turned = lambda clean, chosen, *rest: replace(clean, ~chosen, *rest)
  patch.setattr(corrupt, 'replace', turned)


def choose_others(change):
  """A mistake: another number of tokens is predicted than was asked."""

  def mistake(patch):
    choose = corrupt.choose_tokens
    wrong = lambda candidates, counts, noise: choose(candidates, change(counts), noise)
    patch.setattr(corrupt, 'choose_tokens', wrong)

  return mistake


def weights_are_too_large(patch):
  large = lambda role, fan_in, depth: jax.nn.initializers.normal(0.6)
  patch.setitem(layers.INITS, 'gpt2', large)


def the_next_token_is_seen(patch):
  array = Mask.array
  patch.setattr(
    Mask, 'array', lambda self, *a: array(self, *a) | (jnp.eye(a[0], a[1], 1) > 0)[None]
  )


def the_past_is_not_seen(patch):
  """The causal mask is upside down."""
  array = Mask.array
  patch.setattr(Mask, 'array', lambda self, *a: array(self, *a).mT)


def a_bert_looks_back_only(patch):
  array = Mask.array
  patch.setattr(Mask, 'array', lambda self, *a: array(self.replace(causal=True), *a))


def positions_are_forgotten(patch):
  patch.setattr(Learned, 'add', lambda self, x_BLD, positions_BL: x_BLD)


def rows_are_mixed(patch):
  mix = lambda x_BLD, *_: x_BLD + 0.1 * x_BLD.mean(axis=0, keepdims=True)
  patch.setattr(clm.CausalLM, 'encode', wrapped(clm.CausalLM.encode, mix))


def segments_are_forgotten(patch):
  patch.setattr(Mask, 'segments', lambda self, length: None)


def positions_do_not_begin_anew(patch):
  places = lambda made, tokens, *_: (
    made[0],
    np.arange(tokens.size).reshape(tokens.shape) % twin.LENGTH,
  )
  patch.setattr(pack, 'document_segments', wrapped(pack.document_segments, places))


def the_target_is_seen(patch):
  call = clm.CausalLM.__call__

  def peek(self, batch, train):
    tokens = jnp.where(jnp.arange(twin.LENGTH)[None] % 2, batch['tokens'], batch['targets'])
    return call(self, batch | {'tokens': tokens}, train)

  patch.setattr(clm.CausalLM, '__call__', peek)


def dropout_in_evaluation(patch):
  call = transformer.Transformer.__call__
  noisy = lambda self, x, mask, train, *rest: call(self, x, mask, True, *rest)
  patch.setattr(transformer.Transformer, '__call__', noisy)


def a_part_gets_no_gradient(patch):
  stop = lambda x_BLD, *_: jax.lax.stop_gradient(x_BLD)
  patch.setattr(layers.FeedForward, '__call__', wrapped(layers.FeedForward.__call__, stop))


def a_gradient_of_its_own_is_wrong(patch):
  halved = jax.custom_vjp(lambda table, ids: table[ids])
  backward = lambda saved, d: (layers._rows_backward(saved, 0.5 * d)[0], None)
  halved.defvjp(layers._rows_forward, backward)
  patch.setattr(layers, '_rows', halved)


def inputs_are_lost(patch):
  lost = lambda batch, *_: batch | {'tokens': 0 * batch['tokens'] + 5 + ord('a')}
  patch.setattr(clm.Windows, '__call__', wrapped(clm.Windows.__call__, lost))


def the_step_goes_uphill(patch):
  schedule = optimizer.Optimizer.schedule_fn
  turned = lambda self, *given: lambda count: -schedule(self, *given)(count)
  patch.setattr(optimizer.Optimizer, 'schedule_fn', turned)


def norms_decay(patch):
  patch.setattr(optimizer, '_is_matrix', lambda names: True)


def noise_is_stale(patch):
  patch.setattr(jax.random, 'fold_in', lambda key, data: key)


def one_dropout_of_several_drops_nothing(patch):
  patch.setattr(transformer, 'nn', _with_dropout(deterministic=True))


def one_dropout_of_several_is_at_work_in_evaluation(patch):
  patch.setattr(transformer, 'nn', _with_dropout(deterministic=False))


def _with_dropout(deterministic):
  """flax.linen, in which a dropout that is told at once whether to drop is told this."""
  dropout = lambda rate, **told: nn.Dropout(rate, **dict.fromkeys(told, deterministic))
  return types.SimpleNamespace(**vars(nn) | {'Dropout': dropout})


def a_mean_of_means(patch):
  call = clm.CausalLM.__call__

  def divided(self, batch, train):
    terms, metrics = call(self, batch, train)
    return {key: Mean(term.total / term.weight, 1.0) for key, term in terms.items()}, metrics

  patch.setattr(clm.CausalLM, '__call__', divided)


def a_sum_of_one_device(patch):
  on_rows = shards.on_rows

  def first(function, rows, *places):
    run = on_rows(function, rows, *places)
    if 'totals' not in function.__qualname__:
      return run
    return lambda *args: run(*args)[:1] * 1.0

  patch.setattr(shards, 'on_rows', first)


def logits_are_rounded(patch):
  rounded = lambda y, *_: jnp.round(8 * y) / 8 if y.dtype == jnp.bfloat16 else y
  patch.setattr(layers.Linear, '_product', wrapped(layers.Linear._product, rounded))


ROW = {'objective.separate_documents': True}
DROPOUT = {'model.dropout': 0.1}
MISTAKES = {  # oracle -> what it catches, where
  'function_of_the_step': (a_generator_is_shared, 'mlm', {}),
  'every_token': (the_letter_a_weighs_nothing, 'clm', {}),
  'next_token': (targets_are_not_shifted, 'clm', {}),
  'hidden': (the_mask_is_upside_down, 'mlm', {}),
  'hidden too few': (choose_others(lambda counts: (counts + 1) // 2), 'mlm', {}),
  'hidden too many': (
    choose_others(lambda counts: counts + 2),
    'mlm',
    {'objective.predictions': 16},
  ),
  'first_loss': (weights_are_too_large, 'clm', {}),
  'causality': (the_next_token_is_seen, 'clm', {}),
  'causality of both ways': (a_bert_looks_back_only, 'mlm', {}),
  'order': (positions_are_forgotten, 'mlm', {}),
  'rows': (rows_are_mixed, 'clm', {}),
  'documents': (segments_are_forgotten, 'clm', ROW),
  'packing': (positions_do_not_begin_anew, 'clm', ROW),
  'padding': (segments_are_forgotten, 'mlm', {}),
  'targets': (the_target_is_seen, 'clm', {}),
  'determinism': (dropout_in_evaluation, 'clm', DROPOUT),
  'gradients': (a_part_gets_no_gradient, 'clm', {}),
  'slope': (a_gradient_of_its_own_is_wrong, 'clm', {}),
  'by_heart': (inputs_are_lost, 'clm', {'model.positions': 'none'}),
  'optimizer': (the_step_goes_uphill, 'clm', {}),
  'decay': (norms_decay, 'clm', {'optimizer.weight_decay': 0.1}),
  'noise': (noise_is_stale, 'clm', DROPOUT),
  'noise of all but one': (one_dropout_of_several_drops_nothing, 'clm', DROPOUT),
  'noise in evaluation': (one_dropout_of_several_is_at_work_in_evaluation, 'clm', DROPOUT),
  'micro_batches': (a_mean_of_means, 'clm', {}),
  'sharded': (a_sum_of_one_device, 'clm', {}),
  'bfloat16': (logits_are_rounded, 'clm', {}),
}


def test_every_oracle_has_a_mistake_that_it_catches():
  assert {name.split(' ')[0] for name in MISTAKES} == check.ORACLES.keys()


@pytest.mark.parametrize('name', MISTAKES)
def test_an_oracle_sees_the_mistake(tiny, monkeypatch, name):
  mistake, objective, own = MISTAKES[name]
  oracle = check.ORACLES[name.split(' ')[0]]
  with monkeypatch.context() as patch:
    mistake(patch)
    found = oracle(twin.of(tiny(objective, **own)))
  assert found.holds is False, found
  assert found.meaning


@pytest.mark.parametrize(
  ('name', 'mistake', 'objective', 'meaning'),
  [
    ('causality', the_next_token_is_seen, 'clm', 'It sees the future: '),
    ('causality', the_past_is_not_seen, 'clm', 'It sees the future, and not what is before: '),
    ('order', the_past_is_not_seen, 'clm', 'Earlier tokens are not seen at all'),
    ('order', positions_are_forgotten, 'mlm', 'Positions do not reach the core'),
  ],
)
def test_who_sees_whom_is_said(tiny, monkeypatch, name, mistake, objective, meaning):
  mistake(monkeypatch)
  found = check.ORACLES[name](twin.of(tiny(objective)))
  assert found.holds is False
  assert found.meaning.startswith(meaning)


@pytest.mark.parametrize(
  ('mistake', 'idle', 'noisy'),
  [
    (lambda patch: None, [], []),
    (one_dropout_of_several_drops_nothing, ['Dropout_0', 'Dropout_1'], []),
    (one_dropout_of_several_is_at_work_in_evaluation, [], ['Dropout_0', 'Dropout_1']),
  ],
)
def test_dropouts_are_known_by_their_paths(tiny, monkeypatch, mistake, idle, noisy):
  mistake(monkeypatch)
  made = twin.of(tiny('clm', **DROPOUT, **{'model.attention_dropout': 0.1}))
  blocks, others = ('Dropout_0', 'Dropout_1', 'attention.Dropout_0'), {'core.input_dropout'}
  path = lambda names: {f'core.blocks.{name}' for name in names}
  training, evaluation = made.dropouts(train=True), made.dropouts(train=False)
  assert training == {(name, name not in path(idle)) for name in path(blocks) | others}
  assert {name for name, works in evaluation if works} == path(noisy)


@pytest.fixture
def two_oracles(monkeypatch):
  """So that a start takes a second."""
  names = ('next_token', 'every_token')
  monkeypatch.setattr(check, 'ORACLES', {name: check.ORACLES[name] for name in names})


@pytest.mark.usefixtures('two_oracles')
def test_a_new_run_is_examined_and_one_that_is_taken_up_is_not(tiny, tmp_path, capsys):
  c = tiny('clm', check=True, steps=3)
  train.run(c, str(tmp_path))
  assert '2 oracles hold on a small twin' in capsys.readouterr().out
  (tmp_path / 'result.json').unlink()
  train.run(c, str(tmp_path))
  train.run(tiny('clm', steps=3), str(tmp_path / 'other'))
  assert 'oracles' not in capsys.readouterr().out


@pytest.mark.usefixtures('two_oracles')
def test_a_run_that_is_not_what_it_seems_does_not_begin(tiny, tmp_path, monkeypatch):
  targets_are_not_shifted(monkeypatch)
  with pytest.raises(errors.UserError) as raised:
    train.run(tiny('clm', check=True), str(tmp_path))
  said = str(raised.value)
  assert re.search(r'FAILS  next_token: \d+\.\d% of the targets are the tokens that follow', said)
  assert 'check=False trains all the same' in said
  assert 'every_token' not in said
  assert not (tmp_path / 'config.json').exists()


def test_the_command(tiny, tmp_path):
  """On four devices, whatever machine it is on."""
  experiment = as_file(tiny('clm', **{'sharding.strategy': 'fsdp'}), tmp_path)
  here = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
  command = [sys.executable, '-W', 'ignore', '-m', 'lmjax.check', experiment]
  got = subprocess.run(command, env=here, capture_output=True, text=True, timeout=300)
  assert got.returncode == 0, got.stdout + got.stderr
  found = re.findall(r'^(?:holds|    -)  (\w+): ', got.stdout, re.M)
  assert found == list(check.ORACLES)
  assert 'sharded: under "fsdp" on data 2 x model 2 ' in got.stdout
  *_, last = got.stdout.splitlines()
  assert last.startswith('all holds that should, of a small twin')
  assert 'the data, the tokenizer and the vocabulary of the run itself were not looked at' in last


def test_the_bugs_of_the_campaign_can_still_be_planted():
  """tests/benchmarks/mutations.py edits the source, which moves on."""
  for name, bug in mutations.BUGS.items():
    source = (mutations.ROOT / 'lmjax' / bug.file).read_text()
    assert source.count(bug.right) == 1, f'{name}: {bug.right} is not once in {bug.file}'
    assert not bug.test or (mutations.ROOT / 'tests' / f'{bug.test}_test.py').exists()


@pytest.mark.parametrize('kind', ['published', 'sentencepiece'])
def test_the_twin_of_weights_of_others_has_a_tokenizer_of_its_own(tiny, kind):
  asked = config.base(tokenizer=kind).tokenizer.to_dict()
  asked |= {'path': '/nonexistent', 'vocab_size': 300, 'opening': True}
  assert twin.of(tiny(tokenizer=asked)).tokenizer.vocab_size == twin.VOCABULARY['sentencepiece']
