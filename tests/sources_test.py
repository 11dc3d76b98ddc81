"""Every format gives the same documents back, and every mistake is a sentence naming its place."""

import gzip
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lmjax.data import files, python_corpus, streams
from lmjax.data.sources import open_source
from lmjax.errors import UserError

TEXTS = ['First.', 'Zweitens: Äpfel, 林檎, 🍎', 'third\r\nline\n', 'x' * 5000]


def texts_of(source):
  return [source[i] for i in range(len(source))]


def jsonl(texts, key='text'):
  return ''.join(json.dumps({key: t, 'n': i}) + '\n' for i, t in enumerate(texts)).encode()


def zstd(data):
  import zstandard

  return zstandard.compress(data)


def write_parquet(path, columns, **options):
  import pyarrow as pa
  import pyarrow.parquet as pq

  pq.write_table(pa.table(columns), path, **{'write_page_checksum': True, **options})


def put(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data.encode() if isinstance(data, str) else data)
  return str(path)


PACK = {'': lambda data: data, '.gz': gzip.compress, '.zst': zstd}


@pytest.fixture(scope='session')
def corpus_cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('cache'))


# ---- Round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize('packed', PACK)
@pytest.mark.parametrize(
  ('name', 'data', 'document', 'expected'),
  [
    ('a.jsonl', jsonl(TEXTS), 'file', TEXTS),
    ('a.json', b'\xef\xbb\xbf\n' + jsonl(TEXTS) + b'\r\n', 'line', TEXTS),
    ('a.jsonl', jsonl(['a', '', 'b']).rstrip(), 'file', ['a', '', 'b']),
    ('a.txt', '\ufeffone\r\n\n two \r\n', 'file', ['one\r\n\n two \r\n']),
    ('a.txt', '\ufeffone\r\n\n \t\n two \r\nthree', 'line', ['one', ' two ', 'three']),
    ('a.txt', '\n\ufeffone', 'line', ['\ufeffone']),
    ('a', '\n a\r\nb\n\n \r\nc\nd', 'paragraph', [' a\r\nb', 'c\nd']),
    ('a.md', 'é' * 40000, 'file', ['é' * 40000]),  # the 64 KiB looked at end inside a character
    ('a.md', 'x' + 'é' * 40000, 'line', ['x' + 'é' * 40000]),
  ],
)
def test_round_trip(tmp_path, name, data, document, expected, packed):
  data = data.encode() if isinstance(data, str) else data
  path = put(tmp_path / (name + packed), PACK[packed](data))
  source = open_source(path, document=document)
  assert texts_of(source) == expected
  for i in (-1, len(expected)):
    with pytest.raises(IndexError):
      source[i]


def test_several_members_and_frames(tmp_path):
  put(tmp_path / 'a.txt.gz', gzip.compress(b'one ') + gzip.compress(b'two'))
  put(tmp_path / 'b.txt.zst', zstd(b'three ') + zstd(b'four'))
  assert texts_of(open_source(str(tmp_path))) == ['one two', 'three four']


@pytest.mark.parametrize('packed', PACK)
@pytest.mark.parametrize('kind', ['string', 'large_string', 'dictionary'])
def test_parquet(tmp_path, kind, packed):
  import pyarrow as pa

  texts = [f'{t}{i}' for i in range(5) for t in TEXTS]
  column = pa.array(texts, pa.string())
  column = column.dictionary_encode() if kind == 'dictionary' else column.cast(kind)
  write_parquet(tmp_path / 'a', {'n': range(20), 'content': column}, row_group_size=3)
  path = put(tmp_path / f'a.parquet{packed}', PACK[packed]((tmp_path / 'a').read_bytes()))
  source = open_source(path, text_key='content')
  assert texts_of(source) == texts
  assert [source[i] for i in (19, 0, 7, 3, 2)] == [texts[i] for i in (19, 0, 7, 3, 2)]


def test_directory_of_mixed_kinds_and_globs(tmp_path):
  put(tmp_path / 'b/one.txt', 'text')
  put(tmp_path / 'a.jsonl.gz', gzip.compress(jsonl(['j1', 'j2'])))
  put(tmp_path / '.hidden', 'no')
  put(tmp_path / 'b/.git/no.txt', 'no')
  write_parquet(tmp_path / 'c.parquet', {'text': ['p1', 'p2', 'p3']})
  assert texts_of(open_source(str(tmp_path))) == ['j1', 'j2', 'text', 'p1', 'p2', 'p3']
  assert texts_of(open_source(f'{tmp_path}/*.[jp]*#[:80%]')) == ['j1', 'j2', 'p1', 'p2']
  assert texts_of(open_source(f'{tmp_path}/**/*.txt')) == ['text']
  odd = put(tmp_path / 'd[1]#[:2%].txt', 'a name like a glob with a slice')
  assert texts_of(open_source(odd)) == ['a name like a glob with a slice']
  assert texts_of(open_source(f'{tmp_path}/.hidden')) == ['no']


def _reread(source, queue):
  queue.put([texts_of(source), source.fingerprint])


def test_random_access_and_spawned_workers(tmp_path):
  texts = [f'{i} {"é" * (i % 7)}' for i in range(300)]
  put(tmp_path / 'a.jsonl', jsonl(texts[:100]))
  put(tmp_path / 'b.txt', '\n'.join(texts[100:200]))
  write_parquet(tmp_path / 'c.parquet', {'text': texts[200:]}, row_group_size=7)
  source = open_source(str(tmp_path), document='line')
  assert texts_of(source) == texts
  for i in range(0, 300 * 7, 7):
    assert source[i % 300] == texts[i % 300]
  context = multiprocessing.get_context('spawn')
  queue = context.Queue()
  worker = context.Process(target=_reread, args=(source, queue))
  worker.start()
  assert queue.get(timeout=60) == [texts, source.fingerprint]
  worker.join()


# ---- Slices -------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [10, 997, 1003, 65537])
def test_slice_of_one_text_is_nanogpts(tmp_path, n):
  data = ''.join(chr(0x100 + i % 700) for i in range(n))  # two bytes each, so bytes are not enough
  path = put(tmp_path / 'input.txt', data)
  assert open_source(f'{path}#[:90%]')[0] == data[: int(n * 0.9)]
  assert open_source(f'{path}#[90%:]')[0] == data[int(n * 0.9) :]


@pytest.mark.parametrize(
  ('share', 'expected'),
  [
    ('[:90%]', range(27)),
    ('[90%:]', range(27, 30)),
    ('[10%:20%]', range(3, 6)),
    ('[33.3%:33.4%]', range(9, 10)),
    ('[:]', range(30)),
    ('[99.9%:100%]', range(29, 30)),
  ],
)
def test_slice_of_documents(tmp_path, share, expected):
  path = put(tmp_path / 'a.txt', '\n'.join(map(str, range(30))))
  assert texts_of(open_source(f'{path}#{share}', document='line')) == [str(i) for i in expected]


def test_adjoining_slices_lose_nothing(tmp_path):
  path = put(tmp_path / 'a.txt', '\n'.join(map(str, range(101))))
  cuts = ['', '7%', '33.3%', '58%', '99%', '']
  parts = [
    texts_of(open_source(f'{path}#[{a}:{b}]', document='line')) for a, b in itertools.pairwise(cuts)
  ]
  assert list(itertools.chain(*parts)) == [str(i) for i in range(101)]


# ---- Fingerprints -------------------------------------------------------------------------------


def test_fingerprint_is_of_the_content_and_how_it_is_read(tmp_path):
  path = pathlib.Path(put(tmp_path / 'one/a.txt', 'one\ntwo'))
  seen = {}

  def fingerprint(what, spec=str(path), **kwargs):
    found = open_source(spec, **kwargs).fingerprint
    assert re.fullmatch('[0-9a-f]{16}', found)
    assert found not in seen.values(), f'{what} must change the fingerprint'
    seen[what] = found

  fingerprint('first')
  assert open_source(str(path)).fingerprint == seen['first']
  shutil.copytree(tmp_path / 'one', tmp_path / 'two')  # keeps the times
  assert open_source(f'{tmp_path}/two').fingerprint == seen['first'], 'place is no content'
  fingerprint('document', document='line')
  fingerprint('key', text_key='other')
  fingerprint('slice', f'{path}#[:50%]')
  stat = path.stat()
  path.write_text('one\nTWO')
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  fingerprint('mtime')
  path.write_text('one\ntwo\nthree')
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  fingerprint('size')
  path.rename(path.with_name('b.txt'))
  fingerprint('name', str(path.with_name('b.txt')))


# ---- Mistakes -----------------------------------------------------------------------------------

LONG = b'{"text": "' + b'a' * (files.MAX_LINE) + b'"}'
CUT = {'.gz': lambda data: gzip.compress(data)[:-12], '.zst': lambda data: zstd(data)[:-6]}
NOISE = os.urandom(3000).hex().encode()


@pytest.mark.parametrize(
  ('name', 'data', 'kwargs', 'says'),
  [
    ('a.txt', b'', {}, 'no document'),
    ('a.txt', b' \n\t\n', {}, 'no document'),
    ('a.txt', b'\n \n', {'document': 'line'}, 'no document'),
    ('a.jsonl', b'\n', {}, 'no document'),
    ('a.jsonl', jsonl(['', ' ']), {}, 'no document'),
    ('a.txt', b'abc\0def', {}, 'byte 3 is NUL'),
    ('a.jsonl', b'abc\0def', {}, 'byte 3 is NUL'),
    ('a.txt', b'%PDF-1.7 ...', {}, 'a PDF'),
    # A time would be part of the test's name, which all workers must agree on.
    ('a.txt', gzip.compress(b'text', mtime=0), {}, r'gzip data \(call it .gz\)'),
    ('a.txt', 'text'.encode('utf-16'), {}, 'UTF-16'),
    ('a.txt', b'abc ' + b'\xe9t\xe9 ' * 2, {}, r'byte 4 \(0xe9\) is not UTF-8, and there are 4'),
    ('a.txt', b'\xef\xbb\xbfabc' + b' \xe9' * 4, {}, r'byte 7 \(0xe9\) is not UTF-8'),
    (
      'a.txt',
      b'a ' * 5000 + b'\xff ' * 11,
      {},
      r'byte 10000 \(0xff\) is not UTF-8, and there are 11',
    ),
    ('a.jsonl', jsonl(['a']) + b'{"text": "\xff\xff\xff\xff"}', {}, r'byte 32 \(0xff\)'),
    ('a.jsonl', jsonl(['a']) + b'\n{"text": "b"', {}, 'a.jsonl:3: not JSON'),
    ('a.jsonl', b'[' * 100000, {}, 'a.jsonl:1: not JSON'),
    ('a.json', b'[\n{"text": "b"}]', {}, 'a.json:1: not JSON'),
    ('a.jsonl', b'["text"]', {}, 'a.jsonl:1: not a JSON object but a list'),
    ('a.jsonl', jsonl(['a'], 'txt'), {}, r'a.jsonl:1: no key "text" \(did you mean "txt"\?\)'),
    ('a.jsonl', b'{"text": null}', {}, 'a.jsonl:1: "text" is not a string but a NoneType'),
    ('a.jsonl', b'{"text": ""}\n' + LONG, {}, 'a.jsonl:2: a line longer than 32 MiB'),
    ('a.txt', b'ok\n' + LONG, {'document': 'line'}, 'a.txt:2: a line longer than 32 MiB'),
    ('a.txt.gz', CUT['.gz'](NOISE), {}, 'cannot be read'),
    ('a.jsonl.zst', CUT['.zst'](NOISE), {}, 'middle of a frame'),
    ('a.txt.gz', b'not gzip at all', {}, 'cannot be read'),
    ('a.txt.zst', b'not zstandard at all', {}, 'cannot be read'),
    ('a.txt.gz', gzip.compress(b'\x89PNG', mtime=0), {}, 'an image'),
    ('a.parquet', b'PAR1 and no more', {}, 'damaged Parquet'),
    ('a.txt', b'text', {'document': 'lines'}, r'"lines" is unknown \(did you mean "line"\?\)'),
  ],
)
def test_mistake_in_a_file(tmp_path, name, data, kwargs, says):
  path = put(tmp_path / name, data)
  with pytest.raises(UserError, match=says) as e:
    open_source(path, **kwargs)
  assert path in str(e.value) or 'document' in kwargs
  assert '\n' not in str(e.value)


NOTHING = ['nothing.txt', 'nothing/', '*.nothing', 'nothing/*.txt', 'empty', 'empty/*']
NO_SLICE = ['train', '[:101%]', '[50%:50%]', '[60%:50%]', '[:-1%]', '[:5]', '[0%:0%]', '']
NO_TFDS = ['', '../up', 'a/..', 'a/../b:1.0.0', 'kaggle:a', 'a/b=1', 'Upper']


@pytest.mark.parametrize(
  ('spec', 'says'),
  [
    *((spec, 'no file there') for spec in NOTHING),
    ('nothing.txt#[:9%]', 'no file there'),
    ('**a', 'not a glob'),
    ('gs://bucket/**/*.txt', 'not read in a bucket'),
    *((f'a.txt#{tail}', 'no slice') for tail in NO_SLICE),
    ('a.txt#[:1%]', 'none of the 4 characters'),
    ('b.jsonl#[:1%]', 'none of the 2 documents'),
    *((f'tfds:{name}', 'not of the form') for name in NO_TFDS),
  ],
)
def test_mistake_in_the_spec(tmp_path, monkeypatch, spec, says):
  put(tmp_path / 'a.txt', 'text')
  put(tmp_path / 'b.jsonl', jsonl(['a', 'b']))
  (tmp_path / 'empty').mkdir()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f'{re.escape(spec.partition("#")[0])}.*{says}'):
    open_source(spec)


@pytest.mark.parametrize('spec', ['', '#[:90%]'])
def test_no_spec(spec):
  with pytest.raises(UserError, match='names no source'):
    open_source(spec)


@pytest.mark.skipif(not os.path.exists('/proc/self/mem'), reason='needs a file that cannot be read')
def test_unreadable_file():
  with pytest.raises(UserError, match='/proc/self/mem: cannot be read'):
    open_source('/proc/self/mem')


@pytest.mark.parametrize(
  ('name', 'data', 'kwargs', 'document'),
  [
    ('a.txt', b'abc \xe9t\xe9', {}, 'abc \ufffdt\ufffd'),
    ('a.txt', b'a' * 8000 + b'\xff' * 7, {}, 'a' * 8000 + '\ufffd' * 7),
    ('a.txt', '\ufffd'.encode() * 50 + b'\xff', {}, '\ufffd' * 51),
    ('a.txt', b'a' * 70000 + b'\xff\xff', {}, 'a' * 70000 + '\ufffd' * 2),
    ('a.txt.gz', b'a' * 70000 + b'\xc3', {}, 'a' * 70000 + '\ufffd'),
    ('a.txt', b'ok\n' * 400 + b'\xff\xc3\xa9', {'document': 'line'}, '\ufffdé'),
    ('a.txt', b'ok\n\n' * 400 + b'b\n\xff', {'document': 'paragraph'}, 'b\n\ufffd'),
    ('a.jsonl', jsonl(['a'] * 90) + b'{"text": "\xff"}', {}, '\ufffd'),
    ('a.jsonl', b'{"text": "ab\\ud83c"}', {}, 'ab\ufffd'),
    ('a.jsonl', b'{"text": "\\ud83d\\ude00"}', {}, '\U0001f600'),
    ('a.txt', '\ufffd'.encode(), {}, '\ufffd'),
  ],
)
def test_a_little_that_is_not_utf_8_is_replaced(tmp_path, name, data, kwargs, document):
  data = gzip.compress(data) if name.endswith('.gz') else data
  source = open_source(put(tmp_path / name, data), **kwargs)
  assert source[len(source) - 1] == document


def test_parquet_that_is_not_utf_8_is_replaced(tmp_path):
  path = tmp_path / 'a.parquet'
  write_parquet(path, {'text': ['needle', 'é']}, **PLAIN, write_page_checksum=False)
  path.write_bytes(path.read_bytes().replace(b'needle', b'nee\xffle'))
  source = open_source(str(path))
  assert [source[0], source[1]] == ['nee\ufffdle', 'é']


def test_changes_are_noticed(tmp_path):
  put(tmp_path / 'a.txt', 'fine')
  bad = put(tmp_path / 'b.txt', b'a' * 70000)
  source = open_source(str(tmp_path))
  put(tmp_path / 'b.txt', b'a' * 90000)
  streams._handle.cache_clear()  # as in a worker that opens it later
  with pytest.raises(UserError, match=f'{bad}: it changed'):
    source[1]


def test_bombs_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(streams, 'MAX_FILE', 1 << 20)
  for packed in ('.gz', '.zst'):
    path = put(tmp_path / f'a.txt{packed}', PACK[packed](b'a' * (2 << 20)))
    with pytest.raises(UserError, match=f'{path}: over'):
      open_source(path)
  path = str(tmp_path / 'a.parquet')
  write_parquet(path, {'text': [os.urandom(1 << 20).hex()]})
  with pytest.raises(UserError, match=f'{path}: a row group'):
    open_source(path)


PLAIN = {'compression': 'none', 'use_dictionary': False, 'write_statistics': False}


def test_parquet_mistakes(tmp_path):
  path = tmp_path / 'a.parquet'
  write_parquet(path, {'text': ['a', None], 'n': [1, 2]})
  for key, says in [
    ('txt', 'no column "txt" .did you mean "text"'),
    ('n', 'column "n" holds int64'),
    ('text', 'row 1 of row group 0 has no "text"'),
  ]:
    with pytest.raises(UserError, match=f'{path}: {says}'):
      open_source(str(path), text_key=key)
  write_parquet(path, {'text': []})
  with pytest.raises(UserError, match=f'{path}: .*strings|{path}: no document'):
    open_source(str(path))
  write_parquet(path, {'text': ['needle ' * 50]}, **PLAIN)
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b'needle', b'noodle', 1))
  with pytest.raises(UserError, match=f'{path}: .*CRC'):
    open_source(str(path))
  path.write_bytes(whole[:-9])
  with pytest.raises(UserError, match=f'{path}: damaged Parquet'):
    open_source(str(path))


# ---- TensorFlow Datasets ------------------------------------------------------------------------


@pytest.fixture(scope='session')
def tfds_dir(tmp_path_factory):
  """A small prepared data set `tiny`, as another program would have left it."""
  import tensorflow_datasets as tfds

  class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.2.0')

    def _info(self):
      text, number = tfds.features.Text(), tfds.features.Scalar(np.int64)
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({'text': text, 'label': number})
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(range(100)), 'test': self._generate_examples([7])}

    def _generate_examples(self, numbers):
      for i in numbers:
        yield i, {'text': f'täxt {i}', 'label': i}

  directory = tmp_path_factory.mktemp('tfds')
  Tiny(data_dir=str(directory), file_format='array_record').download_and_prepare()
  # What a session does not have is the builder's code: only the files speak.
  del tfds.core.registered._DATASET_REGISTRY['tiny']
  return directory


@pytest.fixture
def tiny(tfds_dir, tmp_path, monkeypatch):
  shutil.copytree(tfds_dir, tmp_path / 'tfds')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  return tmp_path / 'tfds/tiny/1.2.0'


def test_tfds(tiny):
  source = open_source('tfds:tiny')
  texts = texts_of(source)
  assert sorted(texts) == sorted(f'täxt {i}' for i in range(100))
  assert [source[i] for i in (99, 0, 50)] == [texts[i] for i in (99, 0, 50)]
  assert texts_of(pickle.loads(pickle.dumps(source))) == texts
  assert texts_of(open_source('tfds:tiny:1.2.0#train[:99%]')) == texts[:99]
  assert texts_of(open_source('tfds:tiny#test')) == ['täxt 7']
  again = open_source('tfds:tiny')
  assert again.fingerprint == source.fingerprint
  halves = [open_source(f'tfds:tiny#train[{half}]').fingerprint for half in (':50%', '50%:')]
  assert len({source.fingerprint, *halves}) == 3
  with pytest.raises(IndexError):
    source[-1]


@pytest.mark.parametrize(
  ('spec', 'key', 'says'),
  [
    ('tfds:tiny#nothing', 'text', 'the splits test, train'),
    ('tfds:tiny#train[', 'text', 'cannot read split'),
    ('tfds:tiny', 'label', r"no text feature \"label\".*\['label', 'text'\].*\['text'\]"),
    ('tfds:tiny:9.9.9', 'text', 'prepare it elsewhere'),
    ('tfds:lm1c', 'text', r'did you mean "lm1b"\?.*lmjax\[tfds\]'),
  ],
)
def test_tfds_mistakes(tiny, spec, key, says):
  with pytest.raises(UserError, match=says) as e:
    open_source(spec, text_key=key)
  assert str(e.value).startswith(spec)


def test_tfds_of_another_format(tiny):
  info = tiny / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(UserError, match='prepare it elsewhere'):
    open_source('tfds:tiny')


@pytest.mark.parametrize('key', ['pythonClassName', 'python_class_name', 'type'])
def test_tfds_imports_no_foreign_class(tiny, key, monkeypatch):
  path = tiny / 'features.json'
  found = json.loads(path.read_text())
  feature = found['featuresDict']['features']['text']
  del feature['pythonClassName']
  feature[key] = 'evil_module.Text'
  path.write_text(json.dumps(found))
  put(tiny.parent / 'evil_module.py', 'raise SystemExit("imported")')
  monkeypatch.syspath_prepend(tiny.parent)
  with pytest.raises(UserError, match=f'{path}: names the class "evil_module.Text"'):
    open_source('tfds:tiny')
  path.write_text('{')
  with pytest.raises(UserError, match=f'{path}: damaged'):
    open_source('tfds:tiny')


# ---- The embedded corpus ------------------------------------------------------------------------

PREPARE = """
import sys
from lmjax.data.sources import open_source
print(*(open_source(f'python#{split}', cache=sys.argv[1]).fingerprint
        for split in ('train', 'validation')))
"""


def test_python_corpus(corpus_cache):
  train = open_source('python', cache=corpus_cache)
  validation = open_source('python#validation', cache=corpus_cache)
  texts, held_out = texts_of(train), texts_of(validation)
  assert sum(map(len, texts)) > 1_000_000
  assert 0.01 < sum(map(len, held_out)) / sum(map(len, texts)) < 0.15
  assert len({*texts, *held_out}) == len(texts) + len(held_out)
  assert train.fingerprint != validation.fingerprint
  assert texts_of(pickle.loads(pickle.dumps(validation))) == held_out
  assert not list(pathlib.Path(corpus_cache).rglob('*preparing*'))
  with pytest.raises(UserError, match=r'python#test: .* the splits train, validation'):
    open_source('python#test', cache=corpus_cache)


def test_python_corpus_is_deterministic_and_two_may_prepare_at_once(corpus_cache, tmp_path):
  cache = str(tmp_path / 'fresh')
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  both = [
    subprocess.Popen(
      [sys.executable, '-c', PREPARE, cache],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  outputs = [process.communicate(timeout=100) for process in both]
  splits = ('train', 'validation')
  here = [open_source(f'python#{s}', cache=corpus_cache).fingerprint for s in splits]
  said = f'collecting the texts that this Python carries\n{" ".join(here)}\n'
  assert outputs == [(said, '')] * 2, 'neither another hash nor any noise'
  there = open_source('python#validation', cache=cache)
  assert texts_of(there) == texts_of(open_source('python#validation', cache=corpus_cache))


def test_interrupted_preparation_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'write_text', interrupt)  # the last thing before the rename
    patch.setattr(shutil, 'rmtree', lambda *_, **__: None)  # nobody cleans up after a SIGKILL
    with pytest.raises(KeyboardInterrupt):
      open_source('python', cache=str(tmp_path))
  assert list(tmp_path.rglob('*.array_record*'))
  assert len(open_source('python', cache=str(tmp_path))) > 100


def test_installation_without_sources(tmp_path, monkeypatch):
  put(tmp_path / 'lib/os.py', 'pass')
  monkeypatch.setattr(python_corpus, 'stdlib', lambda: tmp_path / 'lib')
  monkeypatch.setattr(python_corpus, 'installation', lambda: 'bare')
  with pytest.raises(UserError, match=r'/lib: .* without its sources'):
    open_source('python', cache=str(tmp_path / 'cache'))


def test_near_duplicates_and_what_does_not_decode_are_dropped(tmp_path, monkeypatch):
  lines = [f'line {i} of the table' for i in range(20)]
  put(tmp_path / 'a.py', '\n'.join(lines))
  put(tmp_path / 'b.py', '\n'.join([*lines[:11], *map(str.upper, lines[:9])]))
  put(tmp_path / 'c.py', '\n'.join([*lines[:10], *map(str.title, lines[:10])]))
  put(tmp_path / 'd.py', b'\xff')
  put(tmp_path / 'tests/e.py', 'not wanted')
  monkeypatch.setattr(python_corpus, 'stdlib', lambda: tmp_path)
  documents, skipped = python_corpus.collect()
  assert [name for name in documents if name.startswith('stdlib/')] == [
    'stdlib/a.py',
    'stdlib/c.py',
  ]
  assert skipped['undecodable'] == 1


@pytest.mark.parametrize(
  ('name', 'split'),
  [('stdlib/abc.py', 'train'), ('stdlib/warnings.py', 'train'), ('topics/class', 'train')],
)
def test_split_is_fixed(name, split):
  assert python_corpus.split_of(name) == split


def test_importing_is_light():
  code = 'import sys, lmjax.data.sources; print(*sys.modules)'
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True)
  heavy = {'jax', 'tensorflow_datasets', 'pyarrow', 'zstandard'}
  assert not heavy & set(done.stdout.decode().split())
  assert done.returncode == 0
