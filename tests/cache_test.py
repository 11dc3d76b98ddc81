"""What is kept in the cache: found again, and made again where it is damaged."""

import shutil

import pytest

from lmjax.data import cache, sources, tokenizer
from lmjax.errors import UserError

OPTIONS = {'name': 'wordpiece', 'vocab_size': 150}


@pytest.fixture
def made(corpus, tmp_path, capsys):
  """made() -> (the tokenizer, what was said, its directory)."""
  source = sources.open_source(str(corpus / 'train.txt'), document='line')

  def make():
    found = cache.trained(OPTIONS, source, str(tmp_path))
    (directory,) = (tmp_path / 'tokenizers').glob('*[!k]')
    return found, capsys.readouterr(), directory

  return make


def test_it_is_trained_once(made, monkeypatch):
  first, said, _ = made()
  assert 'training the tokenizer wordpiece' in said.out
  monkeypatch.setattr(tokenizer, 'get', None)
  again, said, _ = made()
  assert again.fingerprint == first.fingerprint
  assert said.out == said.err == ''


@pytest.mark.parametrize('harm', ['flip', 'file', 'all files', 'directory'])
def test_a_damaged_one_is_trained_again(made, harm):
  first, _, directory = made()
  for name in ('tokenizer.model', 'tokenizer.json')[: 2 if harm == 'all files' else 1]:
    if harm == 'flip':
      data = bytearray((directory / name).read_bytes())
      data[-3] ^= 1
      (directory / name).write_bytes(data)
    else:
      (directory / name).unlink()
  if harm == 'directory':
    shutil.rmtree(directory)
  again, said, same = made()
  assert (again.fingerprint, same) == (first.fingerprint, directory)
  assert 'training the tokenizer wordpiece' in said.out
  assert (f'the tokenizer in {directory}' in said.err) == (harm != 'directory')
  assert not list(directory.parent.glob('*.tmp'))


def test_without_locks_what_another_has_made_stays(made, tmp_path, monkeypatch):
  """As in a bucket: both train, and the second finds the first one's."""
  monkeypatch.setattr(cache.fcntl, 'flock', lambda *_: (_ for _ in ()).throw(OSError(95, 'none')))
  train, there = tokenizer.get, []

  def slow(*args, **kwargs):
    result = train(*args, **kwargs)
    monkeypatch.setattr(tokenizer, 'get', train)
    _, _, directory = made()  # another process, meanwhile
    there.append((directory / 'tokenizer.json').stat().st_ino)
    return result

  monkeypatch.setattr(tokenizer, 'get', slow)
  _, _, directory = made()
  assert there == [(directory / 'tokenizer.json').stat().st_ino]
  assert not list(directory.parent.glob('*.tmp'))


def test_what_cannot_be_read_now_is_not_thrown_away(made, monkeypatch):
  _, _, directory = made()

  def failing(path):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(tokenizer.jsonio, 'read', failing)
  with pytest.raises(UserError, match='Input/output error'):
    made()
  assert (directory / 'tokenizer.json').exists()
