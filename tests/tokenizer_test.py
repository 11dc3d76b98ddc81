"""Round trips, sameness, ids by hand, and the user's mistakes, for every kind of tokenizer."""

import ast
import inspect
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from lmjax.data import tokenizer as tokenizers
from lmjax.errors import UserError

SPELT = '[SEP] [UNK][MASK] </s> <s> <0x0A> ▁ ▁▁a ⁇ ▅'
NASTY = {
  'empty': '',
  'spelt specials': SPELT,
  'accents': 'naïve Ångström ﬁ ½ Ａ İstanbul ß ΟΔΟΣ',
  'combining': 'e\u0301 o\u0308\u0323 \u0301alone',
  'chinese': '北京 and 東京タワー 한국어 \U00020000\uf900',
  'emoji': '😀👍🏽 👨‍👩‍👧‍👦 🇩🇪',
  'right to left': 'שלום עולם مرحبا \u200f(x)',
  'tabs and CRLF': '\ta\tb\r\n\r\nc\r',
  'code': 'def f(x):\n    if x:\n\t\treturn 1\n\n\n          y = 2\n',
  'spaces': '   a    b' + ' ' * 70 + '\n \n  ',
  'long word': 'x' * 5000 + 'é' * 300,
  'separators': 'a\u2028b\u2029c\x85d\xa0e\u3000f\x0bg\x1ch',
  'edges': '\0 \ufeff\ufffd\x7f\U0010ffff\ue000',
}
KINDS = {
  'bpe': ('sentencepiece', {'vocab_size': 500}),
  'unigram': ('sentencepiece', {'vocab_size': 500, 'model_type': 'unigram'}),
  'uncased': ('wordpiece', {'vocab_size': 300}),
  'cased': ('wordpiece', {'vocab_size': 300, 'lowercase': False}),
  'characters': ('characters', {}),
  'bytes': ('bytes', {}),
}


def corpus() -> list[str]:
  rng = random.Random(0)
  words = [''.join(rng.choices('abcdeorstABéŽ北', k=rng.randint(2, 6))) for _ in range(400)]
  lines = [' '.join(rng.choices(words, k=8)) + '.\n' for _ in range(400)]
  return [''.join(lines[i : i + 20]) for i in range(0, 400, 20)]


def make(kind: str):
  name, knobs = KINDS[kind]
  return tokenizers.get(name, corpus, **knobs)


@pytest.fixture(scope='module', params=KINDS)
def made(request):
  return request.param, make(request.param)


@pytest.mark.parametrize('text', NASTY.values(), ids=NASTY)
def test_round_trip(made, text):
  kind, tokenizer = made
  assert tokenizer.lossless == (kind in ('bpe', 'unigram', 'bytes'))
  if kind == 'characters':  # knows those of its texts alone
    text = ''.join(c for c in text if c in tokenizer.pieces)
  if kind in ('cased', 'uncased'):  # loses case and space, but is stable, and unknown is unknown
    known = [i for i in tokenizer.encode(text) if i != tokenizer.unk]
    assert tokenizer.encode(tokenizer.decode(known)) == known
  else:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_unicode_round_trips(made):
  _, tokenizer = made
  rng = random.Random(1)
  pools = ['ab \n\t▁▅', [chr(c) for c in range(0xD800)], [chr(c) for c in range(0xE000, 0x110000)]]
  for _ in range(300):
    text = ''.join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 40)))
    if tokenizer.lossless:
      assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode(text)) & (special_ids(tokenizer) - {tokenizer.unk})


def special_ids(tokenizer) -> set[int]:
  return set(np.flatnonzero(tokenizer.special).tolist())


def test_specials(made):
  _, t = made
  assert [t.pad, t.unk, t.cls, t.sep, t.mask] == [0, 1, 2, 3, 4]
  assert (t.bos, t.eos) == (t.cls, t.sep)
  assert special_ids(t) == {0, 1, 2, 3, 4}
  assert t.special.shape == t.starts_word.shape == (t.vocab_size,)
  ids = t.encode('ab\n' + SPELT)
  assert not special_ids(t) & set(ids) - {t.unk}
  assert all(type(i) is int and 0 <= i < t.vocab_size for i in ids)
  known = [i for i in ids if i != t.unk]
  assert t.decode(np.array([t.cls, *known[:1], t.pad, *known[1:], t.sep])) == t.decode(known)
  assert t.decode([]) == ''


def test_lone_surrogates_are_replacement_characters(made):
  _, tokenizer = made
  assert tokenizer.encode('a\ud800b') == tokenizer.encode('a\ufffdb')


def test_batch_is_one_by_one(made):
  _, tokenizer = made
  texts = [*NASTY.values(), *corpus()[:3]]
  assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_save_load_pickle(made, tmp_path):
  _, tokenizer = made
  tokenizer.save(tmp_path / 'new' / 'place')
  for other in (tokenizers.load(tmp_path / 'new/place'), pickle.loads(pickle.dumps(tokenizer))):
    assert other.fingerprint == tokenizer.fingerprint
    assert (other.name, other.lossless) == (tokenizer.name, tokenizer.lossless)
    assert other.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(other.starts_word, tokenizer.starts_word)
    for text in NASTY.values():
      assert other.encode(text) == tokenizer.encode(text)


def test_fingerprints_tell_vocabularies_apart():
  prints = [make(kind).fingerprint for kind in KINDS]
  prints.append(tokenizers.get('characters', ['abc']).fingerprint)
  assert len(set(prints)) == len(prints)
  assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


def test_training_again_gives_the_same():
  """In other processes: the WordPiece trainer's hash maps are seeded by the process."""
  code = (
    'import sys; sys.path.insert(0, "tests"); import tokenizer_test as t\n'
    'print(*(t.make(kind).fingerprint for kind in t.KINDS))'
  )
  here = ' '.join(make(kind).fingerprint for kind in KINDS)
  for _ in range(2):
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert there.stderr == ''  # trainers are quiet


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_sentencepiece_learns_from_all_text(kind):
  """Long lines, the trainer's own mark, tabs and indentation are neither skipped nor lost."""
  name, knobs = KINDS[kind]
  hidden = ['qqzzy ' * 3000, 'wwkkj▅wwkkj▁wwkkj ' * 50, '\tmmnnp\n        ' * 50]
  tokenizer = tokenizers.get(name, [*corpus(), *hidden], **knobs)
  for word in (' qqzzy', 'wwkkj', 'mmnnp'):
    assert len(tokenizer.encode(word)) <= 2
  assert len(tokenizer.encode('\n        ')) == 1
  assert tokenizer.decode(tokenizer.encode(''.join(hidden))) == ''.join(hidden)


def test_sentencepiece_starts_word():
  tokenizer = make('bpe')
  ids = tokenizer.encode('abba\tabba abba\n    abba')
  starts = [tokenizer.decode(ids[i:]) for i in range(len(ids)) if tokenizer.starts_word[ids[i]]]
  assert '\tabba abba\n    abba' in starts
  assert ' abba\n    abba' in starts
  assert '\n    abba' in starts
  assert 'abba' not in starts


VOCABULARY = (
  '[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able aff able naive Naive naïve ##s , $ [ ] SE'
)
VOCABULARY = [*VOCABULARY.split(), '北', 'σας', '##P', 'sep', 'x', '##x', 'ab', '\u2028']


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  path = tmp_path_factory.mktemp('bert') / 'vocab.txt'
  path.write_bytes('\n'.join([*VOCABULARY, '']).encode())

  def read(lowercase: bool):
    return tokenizers.get(
      'wordpiece', (), path=str(path), vocab_size=len(VOCABULARY), lowercase=lowercase
    )

  return read


@pytest.mark.parametrize(
  ('lowercase', 'text', 'pieces'),
  [
    (True, 'unaffable UNAFFABLE', 'un ##aff ##able un ##aff ##able'),
    (False, 'unaffable UNAFFABLE', 'un ##aff ##able [UNK]'),
    (True, 'Naïve nai\u0308ve naïves', 'naive naive naive ##s'),
    (False, 'Naïve naïve Naive naive', '[UNK] naïve Naive naive'),
    (True, 'ΣΑΣ', 'σας'),  # the last sigma of a word
    (True, 'un,able$[un]', 'un , able $ [ un ]'),
    (True, 'un北able北北', 'un 北 able 北 北'),
    (True, ' \t\n\r\xa0\u3000un\u2028able ', 'un able'),
    (True, 'a\0b a\x0bb a\x1cb a\xadb a\u200db a\ufffdb', 'ab ab ab ab ab ab'),
    (True, 'naïve,x$x “un” un', 'naive , x $ x [UNK] un [UNK] un'),
    (True, '[SEP] [sep]', '[ sep ] [ sep ]'),
    (False, '[SEP]', '[ SE ##P ]'),
    (True, 'x' * 200, 'x' + ' ##x' * 199),
    (True, 'x' * 201 + ' x', '[UNK] x'),
    (True, '\u0301', ''),
    (False, '\u0301', '[UNK]'),
    (True, 'unq 😀', '[UNK] [UNK]'),
  ],
)
def test_wordpiece_by_hand(bert, lowercase, text, pieces):
  tokenizer = bert(lowercase)
  assert [VOCABULARY[i] for i in tokenizer.encode(text)] == pieces.split()


def test_wordpiece_ids_words_and_missing_specials(bert, tmp_path):
  tokenizer = bert(True)
  ids = tokenizer.encode('unaffable naives')
  assert ids == [5, 6, 7, 10, 13]
  assert tokenizer.starts_word[ids].tolist() == [True, False, False, True, False]
  assert tokenizer.decode([2, *ids, 3]) == 'unaffable naives'
  assert bert(False).fingerprint != tokenizer.fingerprint
  (tmp_path / 'v').write_text('a\r\n[UNK]\r\n##b\r\n[SEP]\r\n')
  few = tokenizers.get('wordpiece', (), path=str(tmp_path / 'v'), vocab_size=0)
  (tmp_path / 'w').write_text('a\n[UNK]\n##b\n[SEP]')
  same = tokenizers.get('wordpiece', (), path=str(tmp_path / 'w'), vocab_size=4)
  assert same.fingerprint == few.fingerprint
  assert (few.pad, few.unk, few.cls, few.sep, few.mask) == (None, 1, None, 3, None)
  assert few.encode('ab c') == [0, 2, 1]
  assert special_ids(few) == {1, 3}


def test_wordpiece_leaves_out_rare_characters():
  texts = ['ab ab', ''.join(chr(0x4E00 + i) for i in range(1100))]
  tokenizer = tokenizers.get('wordpiece', texts, vocab_size=5 + 1000 + 2)
  assert len([piece for piece in tokenizer.pieces if piece > '一']) <= 998
  assert tokenizer.pieces[-2:] == ['##b', 'ab']


def test_sentencepiece_from_file(tmp_path):
  """As T5's: its own ids for eos, pad and unk, its own normalisation, no mask."""
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus()),
    model_prefix=str(tmp_path / 'm'),
    vocab_size=60,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    control_symbols=['<x>'],
    minloglevel=2,
  )
  named = {'path': str(tmp_path / 'm.model'), 'vocab_size': 0}
  t = tokenizers.get('sentencepiece', (), **named)
  with pytest.raises(UserError, match='nothing comes before a text'):
    tokenizers.get('sentencepiece', (), **named, opening=True)
  with pytest.raises(UserError, match=r'of a file that tokenizer\.path names'):
    tokenizers.get('sentencepiece', corpus(), opening=True)
  assert (t.pad, t.unk, t.cls, t.sep, t.mask) == (0, 2, None, 1, None)
  assert special_ids(t) == {0, 1, 2, 3}
  assert not t.lossless
  reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'm.model'))
  for text in NASTY.values():
    assert t.encode(text) == reference.encode(text)
    assert t.encode(text).count(1) == 0
  assert t.decode([*t.encode('abba  soda'), 1]) == 'abba soda'


def test_characters_and_bytes_by_hand(tmp_path):
  tokenizer = tokenizers.get('characters', ['ba', 'é\n'])
  assert tokenizer.encode('abé\nc') == [6, 7, 8, 5, 1]
  (tmp_path / 'alphabet').write_text('éab\n', encoding='utf-8')
  path = str(tmp_path / 'alphabet')
  assert tokenizers.get('characters', (), path=path).fingerprint == tokenizer.fingerprint
  tokenizer = tokenizers.get('bytes', ())
  assert tokenizer.vocab_size == 261
  assert tokenizer.encode('\0Aé') == [5, 70, 200, 174]
  assert tokenizer.decode([70, 200, 70]) == 'A\ufffdA'


def test_the_sample_is_spread_evenly():
  texts = [f'{i:03d} ' + 'x' * 96 for i in range(1000)]
  kept = tokenizers._sample(iter(texts), 8, 0.01)
  numbers = [int(text[:3]) for text in kept]
  assert 50 <= len(kept) <= 100
  assert len(set(np.diff(numbers))) == 1
  assert numbers[0] == 0
  assert numbers[-1] > 980
  long = 'é' * 10000 + ('line ' * 9 + '\n') * 300
  kept = tokenizers._sample([long], 8, 1.0)
  assert ''.join(kept) == long
  assert max(map(len, kept)) <= 4096
  assert all(chunk.endswith('\n') for chunk in kept[3:])


@pytest.mark.parametrize(
  ('name', 'texts', 'knobs', 'words'),
  [
    ('sentencpiece', [], {}, ['sentencpiece', 'did you mean "sentencepiece"']),
    ('wordpiece', [], {'lower_case': True}, ['lower_case', 'did you mean "lowercase"']),
    ('bytes', [], {'vocab_size': 3}, ['bytes', 'vocab_size', 'none']),
    ('sentencepiece', [], {'model_type': 'unigrm'}, ['unigrm', 'did you mean "unigram"']),
    ('sentencepiece', [], {}, ['no text']),
    ('sentencepiece', ['', ' \n'], {}, ['no text']),
    ('wordpiece', [], {}, ['no text']),
    ('characters', [''], {}, ['no text']),
    ('sentencepiece', ['a b c'], {'vocab_size': 0}, ['vocab_size=0', 'above 0']),
    ('sentencepiece', ['a b c'], {'sample_megabytes': 0.0}, ['sample_megabytes=0.0']),
    ('sentencepiece', ['a b c d'], {}, ['vocab_size=8192', 'write 279 or less']),
    ('sentencepiece', corpus(), {'vocab_size': 100}, ['vocab_size=100', 'write 287 or more']),
    ('wordpiece', ['ab ab'], {}, ['vocab_size=30522', 'write 9 or less']),
    ('wordpiece', ['ab ab'], {'vocab_size': 7}, ['vocab_size=7', 'write 8 or more']),
    ('wordpiece', [], {'path': 'no/such.txt'}, ['no/such.txt', 'No such file']),
    ('characters', [], {'path': '/'}, ['/', 'directory']),
    ('sentencepiece', [], {'path': 'GARBAGE'}, ['GARBAGE', 'no sentencepiece vocabulary']),
    ('wordpiece', [], {'path': 'GARBAGE'}, ['GARBAGE', 'no wordpiece vocabulary']),
    ('wordpiece', [], {'path': 'NO_UNK'}, ['NO_UNK', '[UNK]']),
    ('wordpiece', [], {'path': 'HUGE'}, ['HUGE', '64 MiB']),
    ('wordpiece', [], {'path': 'SMALL'}, ['vocab_size=30522', 'SMALL holds 2', 'write 2']),
  ],
)
def test_mistakes(name, texts, knobs, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'GARBAGE').write_bytes(bytes(range(256)) * 9)
  (tmp_path / 'NO_UNK').write_text('a\nb\n')
  (tmp_path / 'SMALL').write_text('a\n[UNK]\n')
  with open(tmp_path / 'HUGE', 'wb') as file:
    file.truncate((64 << 20) + 1)
  with pytest.raises(UserError) as caught:
    tokenizers.get(name, texts, **knobs)
  assert '\n' not in str(caught.value)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize('damage', ['missing', 'garbage', 'kind', 'model', 'options'])
def test_load_notices_damage(tmp_path, damage):
  make('cased').save(tmp_path)
  about = tmp_path / 'tokenizer.json'
  tree = json.loads(about.read_text())
  if damage == 'missing':
    about.unlink()
  elif damage == 'garbage':
    about.write_bytes(b'\xff{')
  elif damage == 'model':
    with open(tmp_path / 'tokenizer.model', 'ab') as file:
      file.write(b'\nzz')
  else:
    tree[damage] = 'bytes' if damage == 'kind' else {'lowercase': True}
    about.write_text(json.dumps(tree))
  with pytest.raises(UserError, match=str(tmp_path)):
    tokenizers.load(tmp_path)


def test_knobs_can_be_read_from_the_source():
  """One a line, keyword-only, with a plain annotation, a literal default and a comment."""
  source = inspect.getsource(tokenizers)
  lines = source.splitlines()
  functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
  for factory in tokenizers.KINDS.values():
    arguments = functions[factory.__name__].args
    assert [argument.arg for argument in arguments.args] == ['texts']
    for knob, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
      assert type(ast.literal_eval(default)).__name__ == ast.unparse(knob.annotation)
      assert '  # ' in lines[knob.lineno - 1]
    assert len({knob.lineno for knob in arguments.kwonlyargs}) == len(arguments.kwonlyargs)


def test_import_needs_no_tokenizer_library_and_no_jax():
  code = (
    'import sys, lmjax.data.tokenizer\n'
    'print({"jax", "sentencepiece", "tokenizers"} & set(sys.modules))'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'set()'
