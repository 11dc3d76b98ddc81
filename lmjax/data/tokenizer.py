"""Makes tokenizers: trained on a source's texts, loaded from a file, or taken up from a run.

Vocabularies trained here hold [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0..4.
"""

import inspect
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from lmjax import jsonio
from lmjax.config import did_you_mean
from lmjax.data import streams
from lmjax.data.pieces import (
  SPECIALS,
  Bytes,
  Characters,
  Cleaner,
  Published,
  SentencePiece,
  Tokenizer,
  WordPiece,
  as_path,
  build,
  fingerprint_of,
  split_words,
)
from lmjax.errors import UserError

Texts = Iterable[str] | Callable[[], Iterable[str]]
# A line break with its indentation is one token: source code gets faster and no longer, and no
# punctuation melts into the break.
_BREAKS = ['\n\n', '\n\t', *('\n' + '▁' * n for n in (0, 2, 4, 6, 8, 12, 16, 20))]
_REMEDY = ': without it, training makes it again'
_CHUNK = re.compile('.{0,4095}\n|.{1,4096}', re.DOTALL)  # whole lines, as many as fit


def sentencepiece(
  texts: Texts,
  *,
  path: str = '',  # a sentencepiece model to load instead of training one
  vocab_size: int = 8192,  # with specials and 256 bytes; 0 = whatever the file at path holds
  model_type: str = 'bpe',  # bpe | unigram
  sample_megabytes: float = 16.0,  # at most this much text, evenly spread, is trained on
  opening: bool = False,  # prompts begin with the file's <s>, as weights of others have learned
) -> SentencePiece:
  """A lossless vocabulary of BPE or Unigram pieces; equal texts give equal bytes."""
  if path:
    return _from_file(SentencePiece, path, vocab_size, opening=opening)
  if opening:
    raise UserError('tokenizer.opening is of a file that tokenizer.path names')
  if model_type not in ('bpe', 'unigram'):
    hint = did_you_mean(model_type, ('bpe', 'unigram'))
    raise UserError(f'sentencepiece has no model_type "{model_type}"{hint}')
  chunks = _sample(texts, vocab_size, sample_megabytes)
  import sentencepiece

  roles = {f'{role}_id': i for i, role in enumerate(('pad', 'unk', 'bos', 'eos'))}
  names = {key.replace('_id', '_piece'): SPECIALS[i] for key, i in roles.items()}
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      # The trainer skips sentences with its own mark U+2585, and U+2581 is a space to it.
      sentence_iterator=(part for chunk in chunks for part in re.split('[▁▅]', chunk) if part),
      model_writer=model,
      model_type=model_type,
      vocab_size=vocab_size,
      max_sentence_length=1 << 16,  # bytes; more than any chunk has, so none is skipped
      num_threads=1,  # the pieces of Unigram depend on it
      minloglevel=2,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      user_defined_symbols=_BREAKS,
      control_symbols=['[MASK]'],
      **roles,
      **names,
    )
  except RuntimeError as error:
    if limit := re.search(r'(?:too high .* <=|required_chars.* vs) (\d+)', str(error)):
      raise _misfit(vocab_size, int(limit[1])) from None
    raise
  return SentencePiece(model.getvalue())


def wordpiece(
  texts: Texts,
  *,
  path: str = '',  # a BERT vocab.txt to load instead of training one
  vocab_size: int = 30522,  # with specials; 0 = whatever the file at path holds
  lowercase: bool = True,  # BERT uncased: lower case, no accents; False: BERT cased
  sample_megabytes: float = 16.0,  # at most this much text, evenly spread, is trained on
) -> WordPiece:
  """A vocabulary for WordPiece, with the 1000 most used characters; equal texts, equal bytes."""
  if path:
    return _from_file(WordPiece, path, vocab_size, lowercase=lowercase)
  clean, words, uses = Cleaner(), Counter[str](), Counter[str]()
  for chunk in _sample(texts, vocab_size, sample_megabytes):
    words.update(split_words(chunk, clean, lowercase))
  for word, count in words.items():
    uses.update(dict.fromkeys(word, count))
  alphabet = {c for c, _ in uses.most_common(1000)}
  spelt = sorted(word for word in words if alphabet.issuperset(word))
  # The trainer numbers the characters after '##' in the order of a randomly seeded hash map, and
  # breaks ties by these numbers; naming them first makes equal texts give equal vocabularies.
  later = {'##' + c for word in spelt for c in word[1:]}
  named = [*SPECIALS, *sorted(alphabet), *sorted(later)]
  if len(named) > vocab_size:
    raise _misfit(vocab_size, len(named))
  from tokenizers import Tokenizer, models, pre_tokenizers, trainers

  trained = Tokenizer(models.WordPiece(unk_token='[UNK]'))
  trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  options = {'vocab_size': vocab_size, 'special_tokens': named, 'show_progress': False}
  repeated = (f'{word} ' * words[word] for word in spelt)
  trained.train_from_iterator(repeated, trainers.WordPieceTrainer(**options))
  ids = trained.get_vocab()
  if len(ids) < vocab_size:
    raise _misfit(vocab_size, len(ids))
  return WordPiece('\n'.join(sorted(ids, key=ids.__getitem__)).encode(), lowercase)


def characters(
  texts: Texts,
  *,
  path: str = '',  # a UTF-8 file with the characters to know, instead of those in the texts
) -> Characters:
  """The distinct characters of all the texts, by code point."""
  if path:
    return _from_file(Characters, path, 0)
  found = set[str]().union(*map(streams.valid, texts() if callable(texts) else texts))
  if not found:
    raise UserError('there is no text to take characters from')
  return Characters(''.join(found).encode())


def bytes_(texts: Texts = ()) -> Bytes:
  """The 256 bytes."""
  return Bytes(bytes(range(256)).decode('latin-1').encode())


def published(
  texts: Texts = (),
  *,
  path: str = '',  # a tokenizer.json as Hugging Face publishes them
  vocab_size: int = 0,  # 0: as many ids as it has; with more, the last stand for nothing
  opening: bool = False,  # prompts begin as its template says, as weights of others have learned
) -> Published:
  """A vocabulary of others: it is loaded, and never trained."""
  if not path:
    raise UserError('tokenizer.path names no tokenizer.json, and a published one is not trained')
  return _from_file(Published, path, 0, size=vocab_size, opening=opening)


KINDS: dict[str, Callable[..., Tokenizer]] = {
  'sentencepiece': sentencepiece,
  'wordpiece': wordpiece,
  'characters': characters,
  'bytes': bytes_,
  'published': published,
}


def get(name: str, texts: Texts, **kwargs: Any) -> Tokenizer:
  """The tokenizer of kind `name`, trained on one reading of `texts` unless `path` names a file."""
  if name not in KINDS:
    raise UserError(f'there is no tokenizer "{name}"{did_you_mean(name, KINDS)}')
  knobs = inspect.signature(KINDS[name]).parameters
  known = [key for key in knobs if key != 'texts']
  for key in kwargs:
    if key not in known:
      raise UserError(
        f'the {name} tokenizer has no option "{key}"{did_you_mean(key, known or ["none"])}'
      )
  made = KINDS[name](texts, **kwargs)
  for key in ('model_type', 'sample_megabytes') if kwargs.get('path') else ():
    if key in kwargs and kwargs[key] != knobs[key].default:
      raise UserError(
        f'tokenizer.{key} is read by nothing where tokenizer.path names a file: '
        f'set it to {knobs[key].default}, its default'
      )
  return made


def load(directory: str | os.PathLike[str]) -> Tokenizer:
  """Exactly the tokenizer that `save` wrote; UserError where it is missing or damaged."""
  directory = as_path(directory)
  try:
    about = jsonio.read(directory / 'tokenizer.json')
    made = about['kind'], jsonio.read_bytes(directory / 'tokenizer.model'), about['options']
    if fingerprint_of(*made) == about['fingerprint']:
      return build(*made)
  except OSError as error:
    why = f'cannot be read ({error.strerror})'
    raise UserError(f'the tokenizer in {directory} {why}{_REMEDY}') from error
  except (ValueError, KeyError, TypeError):
    pass
  raise UserError(f'the tokenizer in {directory} is damaged{_REMEDY}')


def _from_file(kind: type, path: str, vocab_size: int, **options: Any) -> Any:
  try:
    with open(path, 'rb') as file:
      model = file.read((64 << 20) + 1)
    if len(model) > 64 << 20:
      raise ValueError('it is larger than 64 MiB')
    tokenizer = kind(model, **options)
  except OSError as error:
    raise UserError(f'the tokenizer file {path} cannot be read: {error.strerror}') from error
  except ValueError as error:
    raise UserError(f'{path} is no {kind.name} vocabulary: {error}') from error
  if options.get('opening') and not tokenizer.opening:
    raise UserError(f'tokenizer.opening is set, and by {path} nothing comes before a text')
  if vocab_size not in (0, tokenizer.vocab_size):
    held = tokenizer.vocab_size
    raise UserError(f'vocab_size={vocab_size} but {path} holds {held}; write {held}, or 0 for any')
  return tokenizer


def _misfit(size: int, limit: int) -> UserError:
  most = f'more than these texts give: write {limit} or less'
  least = f'too few for the alphabet of these texts: write {limit} or more'
  return UserError(f'vocab_size={size} is {most if size > limit else least}')


def _sample(texts: Texts, vocab_size: int, megabytes: float) -> list[str]:
  """Every 2^k-th chunk of all the texts, with the least k that keeps within `megabytes`."""
  if vocab_size <= 0 or megabytes <= 0:
    sizes = f'vocab_size={vocab_size} and sample_megabytes={megabytes}'
    raise UserError(f'{sizes} must both be above 0 to train a tokenizer')
  kept: list[str] = []
  size, stride = 0, 1
  documents = texts() if callable(texts) else texts
  for n, found in enumerate(found for text in documents for found in _CHUNK.finditer(text)):
    if n % stride == 0:
      kept.append(streams.valid(found[0]))
      size += len(kept[-1].encode())
    while size > megabytes * 1e6 and len(kept) > 1:
      kept, stride = kept[::2], stride * 2
      size = sum(len(chunk.encode()) for chunk in kept)
  if not any(map(str.strip, kept)):
    raise UserError('there is no text to train a tokenizer on')
  return kept
