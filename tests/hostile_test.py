"""Files that somebody has prepared: each is refused in a sentence, and nothing of it is run."""

import base64
import json
import os
import pathlib
import pickle
import re
import shutil
import sys

import jax
import pytest

from lmjax import experiment, train
from lmjax.data.pieces import fingerprint_of
from lmjax.steps import _digest
from tests.processes_test import spawn

DEEP = b'[' * 200_000
STEP = pathlib.Path('checkpoints/6')
MANIFEST = STEP / 'meta/metadata'


class Payload:
  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path('pwned'),)


PICKLE = pickle.dumps(Payload())


def put(name: str, content: bytes):
  return lambda run: (run / name).write_bytes(content)


def huge(name: str):
  def harm(run):
    with (run / name).open('wb') as file:
      file.truncate(8 << 30)  # takes no room

  return harm


def config(**changes):
  def harm(run):
    c = json.loads((run / 'config.json').read_text())
    for path, value in changes.items():
      *sections, key = path.split('__')
      at = c
      for section in sections:
        at = at[section]
      at[key] = value
    (run / 'config.json').write_text(json.dumps(c))

  return harm


def manifest(change):
  """Signed again, so that it is not refused for its digest."""

  def harm(run):
    m = json.loads((run / MANIFEST).read_text())
    del m['digest']
    change(m)
    (run / MANIFEST).write_text(json.dumps(m | {'digest': _digest(m)}))

  return harm


def every_payload(content: bytes):
  def harm(run):
    for file in (run / STEP / 'state').rglob('d/*'):
      file.write_bytes(content)

  return harm


def linked_payload(run):
  for file in (run / STEP / 'state').rglob('d/*'):
    file.unlink()
    file.symlink_to(run.parent / 'outside' / 'secret')


def tokenizer(**changes):
  """With a fingerprint that is right."""

  def harm(run):
    path = run / 'tokenizer' / 'tokenizer.json'
    about = json.loads(path.read_text()) | changes
    model = (run / 'tokenizer' / 'tokenizer.model').read_bytes()
    about['fingerprint'] = fingerprint_of(about['kind'], model, about['options'])
    path.write_text(json.dumps(about))

  return harm


def quarantine_leads_out(run):
  (run / 'result.json').unlink()
  (run / 'checkpoints' / 'quarantine').symlink_to(run.parent / 'outside')
  (run / MANIFEST).unlink()


def unfinished_leads_out(run):
  (run / 'result.json').unlink()
  (run / 'checkpoints' / '.deleting-3').symlink_to(run.parent / 'outside')
  (run / 'checkpoints' / '9.orbax-checkpoint-tmp').symlink_to(run.parent / 'outside')


def resumed(harm):
  def both(run):
    (run / 'result.json').unlink()
    harm(run)

  return both


def foreign_steps(run):
  (run / 'config.json').unlink()
  (run / 'result.json').unlink()


def cache_inside(run):
  programs = run / 'cache' / 'xla'
  programs.mkdir(parents=True)
  (programs / 'jit_step-0-cache').write_bytes(PICKLE)
  kept = pathlib.Path(json.loads((run / 'config.json').read_text())['cache'])
  shutil.copytree(kept / 'stores', run / 'cache' / 'stores')
  config(cache=str(run / 'cache'))(run)


LOOK, GO_ON, DIFF = 'evaluate', 'train', 'diff'
# name -> (what is done to a run, what is done with it, a part of what is said; '' where it is fine)
CASES = {
  'config: pickle': (put('config.json', PICKLE), LOOK, 'config.json is damaged'),
  'config: deep': (put('config.json', DEEP), LOOK, 'config.json is damaged'),
  'config: huge': (huge('config.json'), LOOK, 'is larger than 64 MiB'),
  'config: a list': (put('config.json', b'[]'), LOOK, 'holds list, and no object'),
  'config: empty': (put('config.json', b'{}'), LOOK, 'model.depth is not set'),
  'config: path of an objective': (config(objective__name='../../evil'), LOOK, 'no objective "..'),
  'config: module as objective': (config(objective__name='os'), LOOK, 'no objective "os"'),
  'config: model': (config(model__name='evil.Evil'), LOOK, 'no model "evil.Evil"'),
  'config: tokenizer': (config(tokenizer__name='__import__'), LOOK, 'no tokenizer "__import__"'),
  'config: optimizer': (config(optimizer__name='inject_hyperparams'), LOOK, 'unknown optimizer'),
  'config: no section': (config(model='evil'), LOOK, 'model'),
  'config: absurd size': (config(model__dim=1 << 40), LOOK, 'does not fit'),
  'config: cache in the run': (cache_inside, LOOK, ''),
  'tokenizer: pickle': (put('tokenizer/tokenizer.json', PICKLE), LOOK, 'tokenizer in'),
  'tokenizer: deep': (put('tokenizer/tokenizer.json', DEEP), LOOK, 'tokenizer in'),
  'tokenizer: model': (put('tokenizer/tokenizer.model', PICKLE), LOOK, 'tokenizer in'),
  'tokenizer: huge': (huge('tokenizer/tokenizer.model'), LOOK, 'tokenizer in'),
  'tokenizer: kind': (tokenizer(kind='../evil'), LOOK, 'tokenizer in'),
  'tokenizer: options': (tokenizer(options={'__class__': 'evil'}), LOOK, 'tokenizer in'),
  'manifest: pickle': (put(str(MANIFEST), PICKLE), LOOK, ''),  # the step before is whole
  'manifest: deep': (put(str(MANIFEST), DEEP), LOOK, ''),
  'manifest: huge': (huge(str(MANIFEST)), LOOK, ''),
  'manifest: names': (
    manifest(lambda m: m['arrays'].update({'params/../../evil': m['arrays']['step']})),
    LOOK,
    'does not fit: params/../../evil is only in it',
  ),
  'manifest: shapes': (
    manifest(lambda m: m['arrays']['params/embed/table'].__setitem__(1, [1 << 40, 1 << 40])),
    LOOK,
    'does not fit: params/embed/table is float32[1099511627776, 1099511627776] there',
  ),
  'arrays: pickle': (every_payload(PICKLE), LOOK, ''),
  'arrays: zeros': (every_payload(b'\0' * 4096), LOOK, ''),
  'arrays: link out': (linked_payload, LOOK, ''),
  'arrays: metadata': (put(str(STEP / 'state/_METADATA'), PICKLE), LOOK, ''),
  'arrays: deep metadata': (put(str(STEP / 'state/_METADATA'), DEEP), LOOK, ''),
  'arrays: handler': (
    put(str(STEP / '_CHECKPOINT_METADATA'), b'{"item_handlers": {"state": "evil.Evil"}}'),
    LOOK,
    '',
  ),
  'step of a long number': (lambda run: (run / f'checkpoints/{"9" * 200}').mkdir(), LOOK, ''),
  'quarantine leads out': (quarantine_leads_out, GO_ON, 'is a link: nothing is moved'),
  'debris leads out': (unfinished_leads_out, GO_ON, ''),
  'steps of somebody else': (foreign_steps, GO_ON, 'choose another workdir'),
  'metrics: pickle': (resumed(put('metrics.jsonl', PICKLE + b'\n')), GO_ON, 'metrics.jsonl'),
  'ledger: deep': (resumed(put('ledger.jsonl', DEEP + b'\n')), GO_ON, 'ledger.jsonl is damaged'),
  'events: pickle': (
    resumed(put('events.jsonl', PICKLE + b'\n')),
    GO_ON,
    'events.jsonl is damaged',
  ),
  'events: back to the future': (
    resumed(put('events.jsonl', b'{"event": "roll_back", "step": 2, "batch": 1, "to": 9}\n')),
    GO_ON,
    'is no log of events',
  ),
  'record: pickle': (put('record.json', PICKLE), DIFF, 'record.json is damaged'),
  'record: deep': (put('record.json', DEEP), DIFF, 'record.json is damaged'),
  'record: a list': (put('record.json', b'[1]'), DIFF, 'holds list'),
  'lines: deep': (put('metrics.jsonl', DEEP + b'\n'), DIFF, 'metrics.jsonl is damaged'),
}

FORBIDDEN = ('pickle.find_class', 'subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn')
FORBIDDEN += ('os.fork', 'socket.connect', 'ctypes.dlopen')


def look(job: dict) -> None:
  """In a process of its own: does with each run what is asked, and prints what came of it."""
  import importlib
  import resource

  from lmjax import evaluate, record
  from lmjax.errors import StorageError, UserError

  evaluate.run(job['good'])  # all that is imported and compiled is there
  train.run(job['config'], job['again'])
  importlib.import_module('pickle')
  seen, outside, root = [], job['outside'], job['root']

  def hook(event, arguments):
    text = str(arguments[0]) if arguments else ''
    ours = event == 'subprocess.Popen' and text == 'git'  # record.py asks for the commit
    if (event in FORBIDDEN and not ours) or (event == 'import' and text.startswith('evil')):
      seen.append(f'{event} {text[:80]}')
    if event in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.listdir'):
      paths = [str(a) for a in arguments[: 2 if event == 'os.rename' else 1]]
      if any(path.startswith(outside) for path in paths) and event != 'open':
        seen.append(f'{event} {paths}')
      writes = event == 'open' and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
      if (
        writes and text.startswith('/') and not text.startswith((root, '/dev/', '/tmp/', '/proc/'))
      ):
        seen.append(f'write {text}')

  sys.addaudithook(hook)
  for name, (action, directory) in job['cases'].items():
    seen.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind, said = '', ''
    try:
      if action == LOOK:
        evaluate.run(directory)
      elif action == GO_ON:
        train.run(job['config'], directory)
      else:
        list(record.diff(job['good'], directory))
    except (UserError, StorageError) as e:
      kind, said = type(e).__name__, str(e)
    except Exception as e:
      kind, said = f'BUG {type(e).__name__}', str(e)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
      f'{name}\t{kind}\t{base64.b64encode(said.encode()).decode()}\t{grown}\t{seen}', flush=True
    )


@pytest.fixture(scope='module')
def told(tiny, tmp_path_factory):
  root = tmp_path_factory.mktemp('hostile')
  c = tiny('clm', **{'batch': 8, 'steps': 6, 'guard.on_bad': 'skip'})
  train.run(c, str(root / 'good'))
  (root / 'outside').mkdir()
  (root / 'outside' / 'secret').write_bytes(b'secret' * 100)
  cases = {}
  for i, (name, (harm, action, _)) in enumerate(CASES.items()):
    run = root / f'run{i}'
    shutil.copytree(root / 'good', run)
    harm(run)
    cases[name] = (action, str(run))
  job = {'good': str(root / 'good'), 'again': str(root / 'again'), 'cases': cases, 'config': c}
  job |= {'root': str(root), 'outside': str(root / 'outside')}
  (root / 'job.json').write_text(json.dumps(job))
  process = spawn(['-m', 'tests.hostile_test', str(root / 'job.json')])
  out, errors = process.communicate(timeout=500)
  assert process.returncode == 0, errors[-3000:]
  lines = [line.split('\t') for line in out.splitlines() if line.count('\t') == 4]
  assert (root / 'outside' / 'secret').read_bytes() == b'secret' * 100
  assert [p.name for p in (root / 'outside').iterdir()] == ['secret']
  assert not pathlib.Path('pwned').exists()
  return {name: rest for name, *rest in lines}


@pytest.mark.parametrize('name', CASES)
def test_nothing_of_it_is_run(told, name):
  kind, said, grown, seen = told[name]
  said, expected = base64.b64decode(said).decode(), CASES[name][2]
  assert seen == '[]', f'{seen}: {said}'
  assert expected in said
  assert kind in (('UserError', 'StorageError') if expected else ('',)), (kind, said)
  assert int(grown) < 1 << 19, 'KiB'  # half a GiB
  assert len(said) < 1000


if __name__ == '__main__':
  look(json.loads(pathlib.Path(sys.argv[1]).read_text()))


@pytest.mark.parametrize(
  ('mode', 'owner', 'of', 'why'),
  [
    (0o700, 0, '', ''),
    (0o755, 0, 'elsewhere', ''),
    (0o775, 0, '', r'others can write to it \(chmod go-w .*/xla\)'),
    (0o757, 0, '', 'others can write to it'),
    (0o700, 1, '', 'it belongs to another user'),
    (0o700, 0, 'cache', 'it lies in the directory of the run'),
  ],
)
def test_programs_of_others_are_not_run(tmp_path, monkeypatch, capsys, mode, owner, of, why):
  kept = []
  programs = tmp_path / 'cache' / 'xla'
  programs.mkdir(parents=True)
  programs.chmod(mode)
  monkeypatch.setattr(jax.config, 'update', lambda key, value: kept.append(value))
  monkeypatch.setattr(os, 'getuid', lambda: programs.stat().st_uid + owner)
  experiment.keep_programs({'cache': str(tmp_path / 'cache')}, tmp_path / of if of else None)
  assert kept == ([] if why else [str(programs), 0])
  said = f'no compiled programs are kept in {programs}: {why}.*\n' if why else ''
  assert re.fullmatch(said, capsys.readouterr().out)
