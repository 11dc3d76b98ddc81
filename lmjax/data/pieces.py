"""Kinds of tokenizers, made of what is saved of them: SentencePiece, WordPiece, characters, bytes,
and those that others publish as a tokenizer.json.

No text, whatever it spells, becomes a special id other than `unk`. A lone surrogate, no Unicode
text, reads as U+FFFD.
"""

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lmjax.data import streams

SPECIALS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
_USUAL = (  # names of these in published vocabularies
  ('[PAD]', '<pad>'),
  ('[UNK]', '<unk>'),
  ('[CLS]', '<s>', '<|begin_of_text|>', '<|endoftext|>'),
  ('[SEP]', '</s>', '<|end_of_text|>', '<|endoftext|>'),
  ('[MASK]', '<mask>'),
)
PROBE = ' \t a  ▁\n\n  Ａé e\u0301 ﬁ½\r\n\0\u200d\ufeff\U0010fffd [SEP]</s><0x0A>  '
# CJK ideographs, extensions A to E, compatibility ideographs; kana and Hangul are words.
_CHINESE = re.compile(
  '[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff'
  '\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]'
)
_ASCII = re.compile('[0-9A-Za-z]+|[^ ]')  # BERT's words and marks, where all is ASCII
_SIGNS = '$+<=>^`|~'  # punctuation to BERT, though not to Unicode


class Tokenizer:
  """What all kinds share; `encode` is each kind's own.

  Attributes: `name`, a key of KINDS; `vocab_size`, V; the special ids `pad, unk, cls, sep, mask`
  (None where a loaded vocabulary has none), `bos` = cls, `eos` = sep; `special` (V,), ids that are
  no text; `starts_word` (V,), ids that begin a word (special ones do); `opening`, ids before a
  prompt; `lossless`, whether any text comes back; `fingerprint`, 16 hex digits over what makes ids.
  """

  name: str
  lossless: bool = False
  opening: Sequence[int] = ()
  encode: Callable[[str], list[int]]
  _join: Callable[[list[int]], str]

  def __init__(
    self,
    model: bytes,
    options: dict[str, Any],
    pieces: list[str],
    ids: Iterable[int | None],
    starts: list[bool],
  ):
    ids = list(ids)
    self.model, self.options, self.pieces, self.vocab_size = model, options, pieces, len(pieces)
    self.pad, self.unk, self.cls, self.sep, self.mask = ids
    self.bos, self.eos = self.cls, self.sep
    self.special = np.zeros(len(pieces), bool)
    self.special[[i for i in ids if i is not None]] = True
    self.starts_word = np.array(starts, bool) | self.special
    self.fingerprint = fingerprint_of(self.name, model, options)

  def __reduce__(self):
    return build, (self.name, self.model, self.options)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """`encode` of each, on one thread: whoever needs more runs one process a core."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`, special ones skipped."""
    ids = np.asarray(ids, int)
    return self._join(ids[~self.special[ids]].tolist())

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes tokenizer.model and, last, tokenizer.json."""
    directory = as_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'tokenizer.model').write_bytes(self.model)
    about = {'kind': self.name, 'options': self.options, 'fingerprint': self.fingerprint}
    (directory / 'tokenizer.json').write_text(json.dumps(about, indent=2) + '\n')


class SentencePiece(Tokenizer):
  """BPE or Unigram pieces (Kudo and Richardson, 2018); normalises nothing when trained here.

  A loaded model keeps its own normalisation; it is `lossless` if it returns a nasty probe. A word
  starts at a piece that begins with white space, so a line's first word belongs to the line break.
  """

  name = 'sentencepiece'

  def __init__(self, model: bytes, opening: bool = False):
    import sentencepiece

    self._sp = sp = sentencepiece.SentencePieceProcessor()
    try:
      sp.LoadFromSerializedProto(model)
    except RuntimeError as error:
      raise ValueError('sentencepiece cannot read it') from error
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    special = [i for i in range(len(pieces)) if sp.is_control(i) or sp.is_unknown(i)]
    ids = [i if i >= 0 else None for i in (sp.pad_id(), sp.unk_id(), sp.bos_id(), sp.eos_id())]
    ids.append(next((i for i in special if pieces[i] == '[MASK]'), None))
    # A space is U+2581 to sentencepiece. Ours spell a real U+2581 in bytes to tell the two apart.
    ours = pieces[:5] == [*SPECIALS]
    self._block = [sp.piece_to_id(f'<0x{b:02X}>') for b in '▁'.encode()] if ours else []
    blank = ('▁', '<0x09>', '<0x0A>', '<0x0D>', '<0x20>')
    starts = [p.startswith(blank) or p[:1].isspace() for p in pieces]
    super().__init__(model, {'opening': opening}, pieces, ids, starts)
    self.special[special] = self.starts_word[special] = True
    self.opening = [sp.bos_id()] if opening and not ours and sp.bos_id() >= 0 else ()
    self.lossless = self.decode(self.encode(PROBE)) == PROBE

  def encode(self, text: str) -> list[int]:
    text = streams.valid(text)
    if not self._block or '▁' not in text:
      return self._sp.encode(text)
    first, *rest = map(self._sp.encode, text.split('▁'))
    return first + [i for part in rest for i in (*self._block, *part)]

  def _join(self, ids: list[int]) -> str:
    return self._sp.decode(ids) if ids else ''


class WordPiece(Tokenizer):
  """BERT's tokenizer (Devlin et al., 2018), id for id that of google-research/bert.

  Drops control characters, U+0000 and U+FFFD; splits at white space, around punctuation and
  around Chinese characters; `lowercase` also strips accents. A word of over 200 characters or with
  no pieces is [UNK]. `decode` puts one space between words.
  """

  name = 'wordpiece'

  def __init__(self, model: bytes, lowercase: bool):
    pieces = [line.strip() for line in model.decode().removesuffix('\n').split('\n')]
    self._ids = {piece: i for i, piece in enumerate(pieces)}
    if '[UNK]' not in self._ids:
      raise ValueError('it has no line [UNK]')
    ids = [self._ids.get(piece) for piece in SPECIALS]
    starts = [not piece.startswith('##') for piece in pieces]
    super().__init__('\n'.join(pieces).encode(), {'lowercase': lowercase}, pieces, ids, starts)
    self._longest = max(map(len, pieces))
    self._clean = Cleaner()
    self._word = functools.lru_cache(1 << 18)(self._match)

  def encode(self, text: str) -> list[int]:
    ids: list[int] = []
    for word in split_words(streams.valid(text), self._clean, self.options['lowercase']):
      ids += self._word(word) if len(word) <= 200 else (self.unk,)
    return ids

  def _match(self, word: str) -> list[int]:
    """The longest piece that fits, from left to right."""
    ids: list[int] = []
    start = 0
    while start < len(word):
      mark = '##' if start else ''
      ends = range(min(len(word), start + self._longest), start, -1)
      end = next((end for end in ends if mark + word[start:end] in self._ids), 0)
      if not end:
        return [self.unk]
      ids.append(self._ids[mark + word[start:end]])
      start = end
    return ids

  def _join(self, ids: list[int]) -> str:
    return ' '.join(self.pieces[i] for i in ids).replace(' ##', '')


class Characters(Tokenizer):
  """One id a character, [UNK] for one that is not in the vocabulary; each is a word of its own."""

  name = 'characters'

  def __init__(self, model: bytes):
    characters = sorted(set(model.decode()))
    pieces = [*SPECIALS, *characters]
    super().__init__(''.join(characters).encode(), {}, pieces, range(5), [True] * len(pieces))
    self._table = np.full(0x110000, self.unk)
    self._table[[ord(c) for c in characters]] = range(5, len(pieces))

  def encode(self, text: str) -> list[int]:
    return self._table[np.frombuffer(streams.valid(text).encode('utf-32-le'), np.uint32)].tolist()

  def _join(self, ids: list[int]) -> str:
    return ''.join(self.pieces[i] for i in ids)


class Bytes(Characters):
  """The bytes of UTF-8 after the five specials, each a word; what is none decodes to U+FFFD."""

  name = 'bytes'
  lossless = True

  def encode(self, text: str) -> list[int]:
    return super().encode(streams.valid(text).encode().decode('latin-1'))

  def _join(self, ids: list[int]) -> str:
    return super()._join(ids).encode('latin-1').decode(errors='replace')


class Published(Tokenizer):
  """What a tokenizer.json of the `tokenizers` library says, id for id.

  `encode` adds nothing of its templates.  The special ids are known by their usual names.
  """

  name = 'published'

  def __init__(self, model: bytes, size: int = 0, opening: bool = False):
    """With so many ids, of which the last may stand for nothing; 0: as many as it has."""
    import tokenizers

    try:
      self._tokenizer = t = tokenizers.Tokenizer.from_str(model.decode())
    except Exception as error:  # it has no class of its own
      raise ValueError(f'tokenizers cannot read it ({str(error)[:200]})') from error
    t.no_padding()
    t.no_truncation()
    t.encode_special_tokens = True  # what a text spells is text
    known = t.get_vocab()
    has = max(known.values(), default=-1) + 1
    if size and size < has:
      raise ValueError(f'it has {has} ids, and not {size}')
    pieces = [t.id_to_token(i) or '' for i in range(size or has)]
    named = lambda names: next((known[name] for name in names if name in known), None)
    marked = any(piece.startswith('##') for piece in pieces)
    blank = ('Ġ', 'Ċ', 'ĉ', '▁')  # GPT-2's space, line break and tabulator; SentencePiece's space
    starts = [not p.startswith('##') if marked else p.startswith(blank) for p in pieces]
    options = {'size': len(pieces), 'opening': opening}
    super().__init__(model, options, pieces, map(named, _USUAL), starts)
    special = [i for i, token in t.get_added_tokens_decoder().items() if token.special]
    self.special[special] = self.starts_word[special] = True
    self.lossless = self.decode(self.encode(PROBE)) == PROBE
    full = t.encode(PROBE)
    begins = full.sequence_ids.index(0) if opening and 0 in full.sequence_ids else 0
    self.opening = full.ids[:begins]

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(streams.valid(text), add_special_tokens=False).ids

  def _join(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)


def build(name: str, model: bytes, options: dict[str, Any]) -> Tokenizer:
  kinds = {kind.name: kind for kind in (SentencePiece, WordPiece, Characters, Bytes, Published)}
  return kinds[name](model, **options)


def fingerprint_of(name: str, model: bytes, options: dict[str, Any]) -> str:
  of_ids = {key: x for key, x in options.items() if key != 'opening'}  # decides none
  about = json.dumps([name, of_ids], sort_keys=True).encode()
  return hashlib.blake2b(about + b'\n' + model, digest_size=8).hexdigest()


def as_path(directory: str | os.PathLike[str]) -> Any:
  """Of a local disk or a bucket; path objects stay what they are."""
  return streams.path(directory) if isinstance(directory, str) else directory


class Cleaner(dict):
  """For str.translate: what BERT makes of each code point, worked out when it is first met."""

  def __missing__(self, code: int) -> str | None:
    c = chr(code)
    category = 'Zs' if c in '\t\n\r' else unicodedata.category(c)
    self[code] = f' {c} ' if _CHINESE.match(c) else ' ' if category == 'Zs' else c
    if category in ('Cc', 'Cf') or c in '\0\ufffd':
      self[code] = None
    return self[code]


def split_words(text: str, clean: Cleaner, lowercase: bool) -> list[str]:
  """BERT's words and single punctuation marks."""
  text = text.translate(clean)
  if text.isascii():
    return _ASCII.findall(text.lower() if lowercase else text)
  words: list[str] = []
  for token in text.split():
    if token.isascii():
      words += _ASCII.findall(token.lower() if lowercase else token)
      continue
    if lowercase:
      letters = unicodedata.normalize('NFD', token.lower())
      token = ''.join(c for c in letters if unicodedata.category(c) != 'Mn')
    apart = (c in _SIGNS or unicodedata.category(c)[0] == 'P' for c in token)
    words += ''.join(f' {c} ' if a else c for c, a in zip(token, apart, strict=True)).split()
  return words
