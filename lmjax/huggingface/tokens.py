"""Tokenizers as they are published beside weights, and ours as others read them."""

import json
from typing import Any

from etils import epath

from lmjax import jsonio
from lmjax.data.pieces import Published, SentencePiece, Tokenizer, WordPiece
from lmjax.errors import UserError

_MERGES = (('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe'))  # the latter of OpenAI
_MODELS = ('tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model')
FILES = ('tokenizer.json', 'vocab.txt', *map(' with '.join, _MERGES), *_MODELS)  # any will do


def find(directory: epath.Path, vocab_size: int) -> Tokenizer | None:
  """The tokenizer in a directory, for a model of so many ids; None where there is none.

  Raises:
    UserError: it is damaged, or has ids that the model does not know.
  """
  made = _find(directory, vocab_size)
  if made and made.vocab_size != vocab_size:
    raise UserError(
      f'the tokenizer in {directory} has {made.vocab_size} ids, and the model {vocab_size}'
    )
  return made


def _find(directory: epath.Path, vocab_size: int) -> Tokenizer | None:
  try:
    if (directory / 'tokenizer.json').exists():
      model = jsonio.read_bytes(directory / 'tokenizer.json')
      return Published(model, vocab_size, opening=True)
    if (directory / 'vocab.txt').exists():
      return Published(_wordpiece(directory), vocab_size, opening=True)
    for names in _MERGES:
      if all((directory / name).exists() for name in names):
        model = _byte_pairs(*(directory / name for name in names))
        return Published(model, vocab_size, opening=True)
    for name in _MODELS:
      if (directory / name).exists():
        # Where nothing is said, Llama's own begins texts with <s>, and T5's has none.
        opening = _options(directory).get('add_bos_token', name == 'tokenizer.model')
        return SentencePiece(jsonio.read_bytes(directory / name), bool(opening))
  except ValueError as e:
    raise UserError(f'the tokenizer in {directory} cannot be read: {e}') from e
  return None


def _options(directory: epath.Path) -> dict[str, Any]:
  about = directory / 'tokenizer_config.json'
  return jsonio.read(about) if about.exists() else {}


def _wordpiece(directory: epath.Path) -> bytes:
  """BERT's, as `transformers` makes it of a vocab.txt."""
  from tokenizers import Tokenizer as Made
  from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

  options = _options(directory)
  pieces = jsonio.read_bytes(directory / 'vocab.txt').decode().rstrip('\n').split('\n')
  ids = {piece.rstrip('\r'): i for i, piece in enumerate(pieces)}
  made = Made(models.WordPiece(ids, unk_token='[UNK]', max_input_chars_per_word=100))
  made.normalizer = normalizers.BertNormalizer(
    handle_chinese_chars=options.get('tokenize_chinese_chars', True),
    strip_accents=options.get('strip_accents'),
    lowercase=options.get('do_lower_case', True),
  )
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece()
  if all(piece in ids for piece in ('[CLS]', '[SEP]')):
    made.post_processor = processors.BertProcessing(
      ('[SEP]', ids['[SEP]']), ('[CLS]', ids['[CLS]'])
    )
  return _special(made, ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'))


def _byte_pairs(vocabulary: epath.Path, merges: epath.Path) -> bytes:
  """GPT-2's and RoBERTa's."""
  from tokenizers import Tokenizer as Made
  from tokenizers import decoders, models, pre_tokenizers, processors

  lines = jsonio.read_bytes(merges).decode().split('\n')
  pairs = [tuple(line.split(' ')) for line in lines if line and not line.startswith('#version')]
  made = Made(models.BPE(jsonio.read(vocabulary), pairs))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  cls, sep, mask = ((name, made.token_to_id(name)) for name in ('<s>', '</s>', '<mask>'))
  if all(id_ is not None for _, id_ in (cls, sep, mask)):  # RoBERTa's
    made.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
  return _special(made, ('<s>', '<pad>', '</s>', '<unk>', '<mask>', '<|endoftext|>'))


def _special(made: Any, names: tuple[str, ...]) -> bytes:
  made.add_special_tokens([name for name in names if made.token_to_id(name) is not None])
  return made.to_str().encode()


def write(tokenizer: Tokenizer, directory: epath.Path, types: bool = False) -> bool:
  """Writes it as `transformers` reads it; False where it has no such form.

  With `types` it also says which half of a pair a token is of.
  """
  about: dict[str, Any] = {
    f'{role}_token': tokenizer.pieces[i]
    for role in ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')
    if (i := getattr(tokenizer, role)) is not None
  }
  halves = ['token_type_ids'] if types else []
  about['model_input_names'] = ['input_ids', *halves, 'attention_mask']
  if isinstance(tokenizer, Published):
    (directory / 'tokenizer.json').write_bytes(tokenizer.model)
    about['tokenizer_class'] = 'PreTrainedTokenizerFast'
  elif isinstance(tokenizer, WordPiece):
    (directory / 'vocab.txt').write_bytes(tokenizer.model + b'\n')
    about |= {'tokenizer_class': 'BertTokenizer', 'do_lower_case': tokenizer.options['lowercase']}
  else:
    return False
  (directory / 'tokenizer_config.json').write_text(json.dumps(about, indent=2) + '\n')
  return True
