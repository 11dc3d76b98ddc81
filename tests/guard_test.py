"""Numbers that cannot be right reach no state, and what is decided then is decided for ever."""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from lmjax import config, errors, fingerprint, guard, metrics, sharding, train
from lmjax.data import loader
from tests.processes_test import free_port, spawn
from tests.storage_test import after, signalled
from tests.train_test import Killed, as_file, assert_same_run, lines

NAN, INF = math.nan, math.inf

# ------------------------------------------------------------------------------------- the verdict

FULL = guard.WINDOW


@pytest.mark.parametrize(
  ('loss', 'gradient', 'count', 'deviations', 'taken', 'spike'),
  [
    (2.0, 1.0, 0, INF, True, False),
    (NAN, 1.0, FULL, 6.0, False, False),
    (INF, 1.0, FULL, 6.0, False, False),
    (-INF, 1.0, FULL, 6.0, False, False),
    (2.0, NAN, FULL, 6.0, False, False),
    (2.0, INF, 0, INF, False, False),
    (2.0, 2e19, 0, INF, False, False),  # finite, and its square is not: it cannot be clipped
    (9.0, 1.0, FULL, INF, True, False),
    (9.0, 1.0, FULL, 6.0, False, True),
    (9.0, 1.0, FULL - 1, 6.0, True, False),  # there is nothing yet to measure it by
    (2.1, 1.0, FULL, 6.0, True, False),
    (-9.0, 1.0, FULL, 6.0, True, False),  # better is no spike
  ],
)
def test_what_cannot_be_right(loss, gradient, count, deviations, taken, spike):
  losses = jnp.asarray(np.random.default_rng(0).normal(2.0, 0.1, FULL), jnp.float32)
  grads = {'a': jnp.ones((2, 3)), 'b': jnp.ones(4).at[2].set(gradient)}
  yes, norm, found = guard.judge(jnp.float32(loss), grads, losses, jnp.int32(count), deviations)
  assert (bool(yes), bool(found['spike'])) == (taken, spike)
  huge = not abs(gradient) < 1e19
  np.testing.assert_allclose(norm, abs(gradient * INF) if huge else math.sqrt(9 + gradient**2))
  assert np.isfinite(found['squares']).tolist() == [True, not huge]


@jax.custom_vjp
def poisoned(x, where, poison):
  """x, whose gradient has `poison` added in one place."""
  return x


poisoned.defvjp(
  lambda x, where, poison: (x, (where, poison)),
  lambda kept, g: (jnp.ravel(g).at[kept[0]].add(kept[1]).reshape(g.shape), None, None),
)


def infect(made) -> None:
  """The batch says what is added to the loss and to the gradients."""
  model = made.model

  def apply(variables, batch, train, rngs=None):
    batch = dict(batch)
    to_loss, to_leaf, place = (batch.pop(key) for key in ('to_loss', 'to_leaf', 'place'))
    leaves, tree = jax.tree.flatten(variables['params'])
    leaves = [poisoned(x, place, to_leaf[i]) for i, x in enumerate(leaves)]
    terms, numbers = model.apply({'params': tree.unflatten(leaves)}, batch, train=train, rngs=rngs)
    return {
      k: metrics.Mean(m.total + to_loss * m.weight, m.weight) for k, m in terms.items()
    }, numbers

  vars(made)['model'] = types.SimpleNamespace(apply=apply)


@pytest.fixture(scope='module', params=[('clm', 'replicate'), ('mlm', 'fsdp')], ids='-'.join)
def ill(request, parts):
  """(step, a state, a good batch, names): the batch says what is added to a loss and gradients."""
  objective, strategy = request.param
  overrides = {'sharding.strategy': strategy, 'micro_batches': 1, 'optimizer.ema': 0.9}
  made = parts(objective, **overrides, **{'guard.on_spike': 'skip', 'batch': 8})
  mesh, model = sharding.make_mesh(), made.model

  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    _, transform, make_state = train.init_state(made, mesh)
    state = make_state()
    rows = loader.Loader(made.examples('train'), 8, 0, made.rows(mesh)).batch(0)
    names = list(fingerprint.named(state.params))
    healthy = {'to_loss': np.float32(0), 'to_leaf': np.zeros(len(names), np.float32), 'place': 0}
    infect(made)
    jitted = jax.jit(train.make_step(made, transform))

  def step(state, batch):
    with jax.set_mesh(mesh), sharding.logical_axes(strategy):
      return jitted(state, batch)

  yield step, state, made.place(rows, mesh) | healthy, names
  vars(made)['model'] = model


def test_a_bad_step_changes_no_bit_and_is_as_if_it_had_not_been(ill):
  step, fresh, good, names = ill
  before = fingerprint.of_tree(fresh)
  after_good = fingerprint.of_tree(step(fresh, good)[0])
  assert before != after_good
  rng = np.random.default_rng(0)
  sizes = [x.size for x in jax.tree.leaves(fresh.params)]
  for poison in (NAN, INF, -INF):
    for leaf in (None, 0, int(rng.integers(len(names)))):
      bad = dict(good)
      if leaf is None:
        bad['to_loss'] = np.float32(poison)
      else:
        bad['to_leaf'] = good['to_leaf'].copy()
        bad['to_leaf'][leaf] = poison
        bad['place'] = int(rng.integers(sizes[leaf]))
      state = fresh
      for _ in range(2):
        state, numbers = step(state, bad)
        assert not numbers['guard']['taken']
      assert fingerprint.of_tree(state) == before
      wrong = ~np.isfinite(numbers['guard']['squares'])
      if leaf is not None:
        assert np.flatnonzero(wrong).tolist() == [leaf]
      assert fingerprint.of_tree(step(state, good)[0]) == after_good


def test_a_spike_is_measured_by_the_steps_that_were_taken(ill):
  step, state, good, _ = ill
  for _ in range(3):
    state, numbers = step(state, good)
    state, _ = step(state, good | {'to_loss': np.float32(NAN)})
  losses = np.asarray(state.losses)
  assert np.isfinite(losses).all()
  assert np.count_nonzero(losses) == int(state.step) == 3
  assert losses[2] == numbers['guard']['loss']
  full = state.replace(step=state.step * 0 + 2 * guard.WINDOW + 1, losses=state.losses * 0 + 5.6)
  full = full.replace(losses=full.losses.at[::2].add(0.1))
  state, numbers = step(full, good | {'to_loss': np.float32(9)})
  assert numbers['guard']['spike']
  assert fingerprint.of_tree(state) == fingerprint.of_tree(full)
  state, numbers = step(full, good)
  assert numbers['guard']['taken']
  assert np.flatnonzero(np.asarray(state.losses) != np.asarray(full.losses)).tolist() == [1]


# ----------------------------------------------------------------------------------------- the run

STEPS = {'steps': 9, 'checkpoint.every': 3, 'evaluate.every': 9, 'log.every': 2}
STEPS |= {'model.depth': 1, 'evaluate.batches': 1}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  one = sharding.make_mesh(devices=jax.devices()[:1])
  make = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda *a, **k: make(*a, **k) if k else one)


def fault(patch, batches, transient=False):
  """The targets of some batches weigh what is no number; a transient fault comes but once."""
  batches, real = set(batches), loader.Loader.batch

  def batch(self, step):
    made = real(self, step)
    if step in batches:
      made = {**made, 'weights': made['weights'] * np.float32(NAN)}
      if transient:
        batches.remove(step)
    return made

  patch.setattr(loader.Loader, 'batch', batch)


def events(workdir) -> list[tuple]:
  path = workdir / 'events.jsonl'
  found = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
  return [(e['event'], e['step'], e['batch'], *([e['to']] if 'to' in e else [])) for e in found]


def killed_after(patch, step):
  def die():
    raise Killed

  after(patch, metrics.Log, 'push', step, die)


def test_a_run_stops_where_nothing_else_is_asked_for(tiny, tmp_path, monkeypatch):
  fault(monkeypatch, [4])
  said = r'step 5: the loss is nan; .* before it were 5\.\d+.*; checkpoint 3 is the last good one'
  for times in (1, 2):
    with pytest.raises(errors.NonFinite, match=said):
      train.run(tiny(**STEPS), str(tmp_path))
    assert events(tmp_path) == [('stop', 5, 4)] * times
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['3']


def test_a_bad_batch_is_skipped_and_counted(tiny, tmp_path, monkeypatch, capsys):
  c = tiny(**STEPS, **{'guard.on_bad': 'skip'})
  with monkeypatch.context() as patch:
    fault(patch, [3, 4])
    result = train.run(c, str(tmp_path / 'straight'))
    said = r'lmjax: step 4: the loss is nan; .*; batch 3 is skipped\nlmjax: step 5: '
    assert re.search(said, capsys.readouterr().err)
    assert result['decisions'] == {'skip': 2, 'roll_back': 0}
    assert events(tmp_path / 'straight') == [('skip', 4, 3), ('skip', 5, 4)]
    written = lines(tmp_path / 'straight', 'metrics')
    losses = {line['step']: line['train/loss'] for line in written if 'train/loss' in line}
    assert list(losses) == [2, 3, 6, 8, 9]
    assert np.isfinite(list(losses.values())).all()
    skipped = {line['step']: line['guard/skipped'] for line in written if 'guard/skipped' in line}
    assert skipped == {4: 1, 6: 1}
    assert [line['step'] for line in lines(tmp_path / 'straight', 'ledger')] == list(range(1, 10))
    for at in (5, 8):
      with patch.context() as dying:
        killed_after(dying, at)
        with pytest.raises(Killed):
          train.run(c, str(tmp_path / f'broken{at}'))
      train.run(c, str(tmp_path / f'broken{at}'))
      assert_same_run(tmp_path / 'straight', tmp_path / f'broken{at}')


def test_what_was_decided_is_done_again_where_the_fault_does_not_come_again(
  tiny, tmp_path, monkeypatch, capsys
):
  """As that of a device; the run goes on from before it, and another replays its events."""
  c = tiny(**STEPS, **{'guard.on_bad': 'skip'})
  plain = train.run(c, str(tmp_path / 'plain'))
  with monkeypatch.context() as patch:
    fault(patch, [4], transient=True)
    result = train.run(c, str(tmp_path / 'straight'))
  assert result['state_fingerprint'] != plain['state_fingerprint']
  with monkeypatch.context() as patch:
    fault(patch, [4], transient=True)
    killed_after(patch, 7)
    with pytest.raises(Killed):
      train.run({**c, 'checkpoint': {**c['checkpoint'], 'every': 4}}, str(tmp_path / 'broken'))
  assert events(tmp_path / 'broken') == [('skip', 5, 4)]
  again = train.run(c, str(tmp_path / 'broken'))
  log = str(tmp_path / 'straight' / 'events.jsonl')
  with open(log, 'a') as file:  # the end of the other is not this one's
    file.write('{"event": "stop", "step": 6, "batch": 6, "why": "it was nan"}\n')
  replayed = train.run({**c, 'guard': {**c['guard'], 'replay': log}}, str(tmp_path / 'replayed'))
  assert events(tmp_path / 'replayed') == [('skip', 5, 4)]
  assert f'lmjax: 1 decisions of {log} hold here too' in capsys.readouterr().err
  for other in (again, replayed):
    assert other['state_fingerprint'] == result['state_fingerprint']
    assert other['decisions'] == result['decisions']


def test_a_run_goes_back_and_leaves_out_what_led_to_it(tiny, tmp_path, monkeypatch, capsys):
  c = tiny(**STEPS, **{'guard.on_bad': 'roll_back'})
  with monkeypatch.context() as patch:
    fault(patch, [4, 9])
    result = train.run(c, str(tmp_path / 'straight'))
    # Batches 3 and 4 are left out; then 9 is that of step 8, and goes with those of step 7.
    assert events(tmp_path / 'straight') == [('roll_back', 5, 4, 3), ('roll_back', 8, 9, 6)]
    assert 'step 5: the loss is nan' in (said := capsys.readouterr().err)
    assert 'going back to step 3' in said
    assert result['decisions'] == {'skip': 0, 'roll_back': 2}
    for at, calls in (('killed', 6), ('killed later', 14), ('asked', 4)):
      with patch.context() as dying:
        if at == 'asked':  # whose checkpoint, of step 4, is not gone back to
          after(dying, metrics.Log, 'push', calls, signalled)
          with pytest.raises(errors.Restart, match='after step 4'):
            train.run(c, str(tmp_path / at))
        else:
          killed_after(dying, calls)
          with pytest.raises(Killed):
            train.run(c, str(tmp_path / at))
      train.run(c, str(tmp_path / at))
      assert_same_run(tmp_path / 'straight', tmp_path / at)
      assert events(tmp_path / at) == events(tmp_path / 'straight')
  # Without the fault, the same batches in the same places are the same run.
  log = str(tmp_path / 'straight' / 'events.jsonl')
  replayed = train.run({**c, 'guard': {**c['guard'], 'replay': log}}, str(tmp_path / 'replayed'))
  assert replayed['state_fingerprint'] == result['state_fingerprint']
  ledger = [line['hash'] for line in lines(tmp_path / 'straight', 'ledger')]
  assert ledger == [line['hash'] for line in lines(tmp_path / 'replayed', 'ledger')]
  assert len(set(ledger)) == 9


FAULTY = """
import runpy, sys
import numpy as np
from lmjax.data import loader
real = loader.Loader.batch
def batch(self, step):
  made = real(self, step)
  return {{**made, 'weights': made['weights'] * np.float32('nan')}} if step == 4 else made
loader.Loader.batch = batch
sys.argv = {argv}
runpy.run_module('lmjax.main', run_name='__main__')
"""


def test_several_processes_go_back_together(tiny, tmp_path, monkeypatch):
  c = tiny(**STEPS, **{'guard.on_bad': 'roll_back'})
  flags = [as_file(c, tmp_path), f'--workdir={tmp_path / "two"}', '--processes=2']
  flags += [f'--coordinator=localhost:{free_port()}']
  codes = [FAULTY.format(argv=['main', *flags, f'--process={i}']) for i in range(2)]
  pair = [spawn(['-c', code]) for code in codes]
  fault(monkeypatch, [4])
  train.run(c, str(tmp_path / 'one'))
  said = [process.communicate(timeout=300)[1] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], said
  assert events(tmp_path / 'one') == events(tmp_path / 'two') == [('roll_back', 5, 4, 3)]
  assert lines(tmp_path / 'one', 'ledger') == lines(tmp_path / 'two', 'ledger')
  losses = [
    [line['train/loss'] for line in lines(tmp_path / run, 'metrics') if 'train/loss' in line]
    for run in ('one', 'two')
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_back_to_the_beginning_where_nothing_is_saved(tiny, tmp_path, monkeypatch):
  fault(monkeypatch, [1])
  train.run(tiny(**STEPS, **{'guard.on_bad': 'roll_back'}), str(tmp_path))
  assert events(tmp_path) == [('roll_back', 2, 1, 0)]
  assert [line['step'] for line in lines(tmp_path, 'ledger')] == list(range(1, 10))


def judging(tmp_path, roll_backs=(), saved=(), **checkpoint):
  """A guard whose run has gone back, (step, batch, to) each, and has saved some steps."""
  c = config.base().to_dict()
  c['guard']['on_bad'], c['checkpoint'] = 'roll_back', c['checkpoint'] | {'every': 10} | checkpoint
  rows = ({'event': 'roll_back', 'step': s, 'batch': b, 'to': to} for s, b, to in roll_backs)
  (tmp_path / 'events.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return guard.Guard(epath.Path(tmp_path), c, ['w'], lambda: list(saved))


@pytest.mark.parametrize(
  ('roll_backs', 'step', 'batch'),
  [
    ([], 7, 6),
    ([(50, 49, 40)], 40, 39),
    ([(50, 49, 40)], 41, 50),
    ([(50, 49, 40), (60, 69, 55)], 45, 54),
    ([(50, 49, 40), (60, 69, 55)], 56, 70),
    # The second goes back over the first, whose batch is not met again.
    ([(8, 7, 6), (7, 8, 3)], 4, 9),
    ([(50, 49, 40), (43, 52, 20)], 21, 53),
    ([(50, 49, 40), (30, 29, 20)], 21, 50),
  ],
)
def test_no_batch_that_led_back_is_met_again(tmp_path, roll_backs, step, batch):
  assert judging(tmp_path, roll_backs).batch(step) == batch


def test_what_was_skipped_and_gone_back_over_is_made(tmp_path):
  row = {'event': 'skip', 'batch': 0}
  rows = [row | {'step': 35}, row | {'step': 45}]
  rows += [{'event': 'roll_back', 'step': 50, 'batch': 49, 'to': 40}, row | {'step': 47}]
  (tmp_path / 'events.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  made = guard.Guard(epath.Path(tmp_path), config.base().to_dict(), ['w'], list)
  assert made.skipped() == {35, 47}
  assert made.counts() == {'skip': 3, 'roll_back': 1}


@pytest.mark.parametrize(
  ('saved', 'checkpoint', 'to'),
  [
    ([20, 30], {}, 30),
    ([20, 30, 33, 34], {}, 30),  # 33 and 34 are there since somebody asked the run to stop
    ([2], {}, 2),
    ([], {}, 0),
    ([10, 20], {}, 20),  # 30 could not be written
    ([10, 33, 34], {}, 34),
    ([20, 30, 33], {'minutes': 5.0}, 33),
  ],
)
def test_where_a_run_goes_back_to(tmp_path, saved, checkpoint, to):
  found = {'taken': False, 'spike': False, 'loss': NAN, 'squares': [NAN]}
  with pytest.raises(guard.RollBack, match=f'going back to step {to}'):
    judging(tmp_path, saved=saved, **checkpoint).accepts(37, found)
  assert events(tmp_path) == [('roll_back', 37, 36, to)]


def test_before_the_first_regular_checkpoint_it_begins_again(tmp_path):
  found = {'taken': False, 'spike': False, 'loss': NAN, 'squares': [NAN]}
  with pytest.raises(guard.RollBack, match='going back to step 0'):
    judging(tmp_path, saved=[2]).accepts(7, found)


@pytest.mark.parametrize('action', ['skip', 'roll_back'])
def test_there_is_a_limit(tiny, tmp_path, monkeypatch, action):
  fault(monkeypatch, range(4, 99))
  c = tiny(**STEPS, **{'guard.on_bad': action, 'guard.limit': 2})
  with pytest.raises(errors.NonFinite, match=r'guard\.limit = 2 are decided already'):
    train.run(c, str(tmp_path))
  assert [event[0] for event in events(tmp_path)] == [action, action, 'stop']


def test_spikes_are_treated_as_asked(tiny, tmp_path, monkeypatch, capsys):
  """The targets of one batch are shifted, so that its loss is above those before it."""
  monkeypatch.setattr(guard, 'WINDOW', 4)
  real = loader.Loader.batch

  def batch(self, step):
    made = real(self, step)
    return {**made, 'targets': 260 - made['targets']} if step == 6 else made

  monkeypatch.setattr(loader.Loader, 'batch', batch)
  spiky = {'optimizer.lr': 0.03, 'guard.on_spike': 'skip', 'guard.deviations': 2.0}
  train.run(tiny(**STEPS, **spiky), str(tmp_path))
  assert events(tmp_path) == [('skip', 7, 6)]
  said = r'loss is (\S+), above (\S+) \(2 deviations above the mean of the last 4\);.* were (.*); b'
  loss, limit, before = re.search(said, capsys.readouterr().err).groups()
  last = [float(x) for x in before.split(', ')][-4:]
  assert float(limit) == pytest.approx(np.mean(last) + 2 * np.std(last), rel=1e-3)
  assert float(loss) > float(limit)


def test_an_update_that_overflows_is_not_saved(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(optax, 'apply_updates', lambda params, _: jax.tree.map(jnp.exp2, params))
  c = tiny(**{**STEPS, 'steps': 12, 'checkpoint.every': 1, 'guard.on_bad': 'skip'})
  with pytest.raises(
    errors.NonFinite, match=r': not finite is params/.*norm/scale; checkpoint 4 is'
  ):
    train.run(c, str(tmp_path))


@pytest.mark.parametrize(
  'text', ['{"event": "skip"}\n', '{"event": "go", "step": 1, "batch": 0}\n', '[1]\n', '{\n']
)
def test_a_log_that_is_none_is_refused(tiny, tmp_path, text):
  (tmp_path / 'log').write_text(text)
  with pytest.raises(errors.UserError, match=r'is no log of events|is damaged'):
    train.run(tiny(**STEPS, **{'guard.replay': str(tmp_path / 'log')}), str(tmp_path / 'run'))


# ------------------------------------------------------------------------------------ the replicas


@pytest.mark.parametrize(('copies', 'accused'), [(8, [5]), (2, [2, 3])])
def test_a_flipped_bit_in_one_replica_is_found(copies, accused):
  mesh = jax.make_mesh(
    (8 // copies, copies), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(('data', 'model')))
  x = jax.device_put(jnp.arange(64.0).reshape(16, 4), place)
  tree = {
    'x': x,
    'key': jax.device_put(jax.random.key(0), everywhere),
    'alone': jax.device_put(jnp.arange(8.0), whole),
  }
  assert fingerprint.disagreements(tree) == {}
  shards = [np.array(shard.data) for shard in x.addressable_shards]
  devices = [shard.device for shard in x.addressable_shards]
  which = next(i for i, device in enumerate(devices) if device.id == accused[-1])
  shards[which].view(np.uint32)[1, 2] ^= 1
  tree['x'] = jax.make_array_from_single_device_arrays(
    x.shape, place, [jax.device_put(s, d) for s, d in zip(shards, devices, strict=True)]
  )
  assert fingerprint.disagreements(tree) == {'x': accused}
  with pytest.raises(errors.Restart, match=rf'replicas of x differ \(on devices \{accused}'):
    guard.check_replicas(tree)


def test_replicas_are_compared_as_often_as_asked_and_before_they_are_saved(
  tiny, tmp_path, monkeypatch
):
  compared = []
  monkeypatch.setattr(guard, 'check_replicas', lambda state: compared.append(int(state.step)))
  train.run(tiny(**STEPS, **{'guard.replicas': 4}), str(tmp_path / 'often'))
  assert compared == [3, 4, 6, 8, 9]
  compared.clear()
  train.run(tiny(**STEPS, **{'guard.replicas': 0}), str(tmp_path / 'never'))
  assert compared == []


def test_checkpoints_by_the_clock(tiny, tmp_path, monkeypatch):
  """Every 7 steps, and when time has passed, at which is looked every second step."""
  c = tiny(
    **{**STEPS, 'checkpoint.every': 7, 'checkpoint.minutes': 1e-9, 'checkpoint.keep_last': 9}
  )
  train.run(c, str(tmp_path))
  there = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  assert there == [2, 4, 6, 7, 8, 9]


def test_sections_say_what_can_be_done():
  for key, value in (('on_bad', 'ignore'), ('on_spike', 'yes'), ('deviations', 0.0)):
    c = config.base()
    c.guard[key] = value
    with pytest.raises(errors.UserError, match=f'guard.{key} = "?{value}'):
      guard.check(c)


@pytest.mark.parametrize(
  ('events', 'saved', 'why'),
  [
    ([], [], ''),
    (['stop'], [], 'step 9: it is nan'),
    (['skip', 'stop'], [3, 8], 'step 9: it is nan'),
    (['stop', 'skip'], [3], ''),
    (['stop'], [3, 12], ''),  # somebody has started it again, and it came further
  ],
)
def test_what_is_known_to_have_been_stopped(tmp_path, events, saved, why):
  made = [{'event': event, 'step': 9, 'batch': 9, 'why': 'it is nan'} for event in events]
  (tmp_path / 'events.jsonl').write_text(''.join(json.dumps(event) + '\n' for event in made))
  for step in saved:
    (tmp_path / 'checkpoints' / str(step)).mkdir(parents=True)
  assert guard.stopped(epath.Path(tmp_path)) == why
