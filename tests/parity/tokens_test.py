"""Published tokenizers, id for id, on texts that nobody would write."""

import json

import pytest

from lmjax.data import tokenizer as made_of
from lmjax.huggingface import tokens
from tests.conftest import documents
from tests.tokenizer_test import NASTY, SPELT

pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers')
import sentencepiece  # noqa: E402
import tokenizers  # noqa: E402

TEXTS = [text for text in NASTY.values() if text != SPELT] + documents(3)
TEXTS += ['x' * n for n in (99, 100, 101, 200, 201)] + ["I'll can't 12345 3.14 #!? \\n"]
SPECIALS = {
  'bert': ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
  'gpt2': ['<|endoftext|>'],
  'roberta': ['<s>', '<pad>', '</s>', '<unk>', '<mask>'],
}


@pytest.fixture(scope='module', params=['bert', 'bert cased', 'gpt2', 'roberta'])
def theirs(request, tmp_path_factory):
  """(their tokenizer, the directory of its files, how many ids it has)."""
  kind, directory = request.param, tmp_path_factory.mktemp('vocabulary')
  special = SPECIALS[kind.split()[0]]
  shown = dict(show_progress=False, special_tokens=special)
  if kind.startswith('bert'):
    made = tokenizers.BertWordPieceTokenizer(lowercase=kind == 'bert')
    made.train_from_iterator([*documents(50), *TEXTS], vocab_size=400, **shown)
    made.save_model(str(directory))
    options = {'do_lower_case': kind == 'bert'}
    (directory / 'tokenizer_config.json').write_text(json.dumps(options))
    return transformers.BertTokenizer.from_pretrained(directory), directory, made.get_vocab_size()
  made = tokenizers.ByteLevelBPETokenizer()
  made.train_from_iterator([*documents(50), *TEXTS], vocab_size=500, **shown)
  made.save_model(str(directory))
  known = {'gpt2': transformers.GPT2Tokenizer, 'roberta': transformers.RobertaTokenizer}
  return known[kind].from_pretrained(directory), directory, made.get_vocab_size()


def ids(tokenizer, text: str) -> list[int]:
  return tokenizer(text, add_special_tokens=False)['input_ids']


def test_ids(theirs, tmp_path):
  """As they lie in their own files, and in the tokenizer.json that `transformers` writes."""
  tokenizer, directory, size = theirs
  tokenizer.save_pretrained(tmp_path)
  assert (tmp_path / 'tokenizer.json').exists()
  for place in (directory, tmp_path):
    ours = tokens.find(place, size)
    for text in TEXTS:
      assert ours.encode(text) == ids(tokenizer, text), (place, text)
    assert ours.pad == tokenizer.pad_token_id or tokenizer.pad_token_id is None
    for role in ('unk', 'mask', 'cls', 'sep'):
      id_ = getattr(tokenizer, f'{role}_token_id', None)
      assert getattr(ours, role) in (id_, 0 if role in ('cls', 'sep') else None)


def test_what_is_written_has_their_ends(theirs, tmp_path):
  """[CLS] and [SEP], and which half of a pair a token is of."""
  tokenizer, directory, size = theirs
  types = 'token_type_ids' in tokenizer.model_input_names
  tokenizer.save_pretrained(tmp_path / 'theirs')
  for i, place in enumerate((directory, tmp_path / 'theirs')):
    at = tmp_path / f'ours{i}'
    at.mkdir()
    assert tokens.write(tokens.find(place, size), at, types)
    again = transformers.AutoTokenizer.from_pretrained(at)
    assert dict(again('The river', 'and a boat')) == dict(tokenizer('The river', 'and a boat'))
    assert dict(again('The river')) == dict(tokenizer('The river'))


ENDS = {  # what a template adds
  'nothing': ('$A', '$A $B:1'),
  'bos': ('<s> $A', '<s> $A <s>:1 $B:1'),
  'both': ('<s> $A </s>', '<s> $A </s> <s>:1 $B:1 </s>:1'),
}
OPTIONS = [{}, {'add_bos_token': True}, {'add_bos_token': False, 'add_eos_token': True}]


@pytest.mark.parametrize('ends', ENDS)
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_what_opens_a_text(tmp_path, ends, options):
  """The template says it, whatever the options beside it say."""
  ids = {'<s>': 0, '</s>': 1, 'a': 2, 'b': 3, '<unk>': 4}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='<unk>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(['<s>', '</s>'])
  single, pair = ENDS[ends]
  special = [('<s>', 0), ('</s>', 1)]
  made.post_processor = tokenizers.processors.TemplateProcessing(single, pair, special)
  made.save(str(tmp_path / 'tokenizer.json'))
  named = {'bos_token': '<s>', 'eos_token': '</s>'}
  about = {'tokenizer_class': 'PreTrainedTokenizerFast', **named, **options}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(about))
  theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), tokens.find(tmp_path, 5)
  assert [*ours.opening, 2, 3, *[1] * (ends == 'both')] == theirs('a b')['input_ids']
  file = str(tmp_path / 'tokenizer.json')
  assert not made_of.published(path=file).opening, 'a model of ours has never seen it'
  opening = bool(ours.opening)
  assert made_of.published(path=file, opening=opening).opening == ours.opening
  (tmp_path / 'again').mkdir()
  tokens.write(ours, tmp_path / 'again')
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'again')
  for given in (('a b',), ('a b', 'a')):
    assert again(*given)['input_ids'] == theirs(*given)['input_ids']


@pytest.mark.parametrize('opens', [True, False, None])
def test_a_sentencepiece_model_as_it_is(tmp_path, opens):
  """Of decoders like Llama, whose options say whether <s> opens a text."""
  texts = [text.replace('\n', ' ') for text in documents(50) + TEXTS if '\0' not in text]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_prefix=str(tmp_path / 'tokenizer'),
    vocab_size=420,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    minloglevel=2,
  )
  options = {} if opens is None else {'add_bos_token': opens}
  about = json.dumps({'tokenizer_class': 'LlamaTokenizer', **options})
  (tmp_path / 'tokenizer_config.json').write_text(about)
  ours = tokens.find(tmp_path, 420)
  assert list(ours.opening) == [1] * (opens is not False), 'so was Llama trained'
  theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
  # Nothing comes before white space there, where sentencepiece itself puts its space.
  for text in (text for text in TEXTS if text.strip() and not text[0].isspace()):
    assert ours.encode(text) == ids(theirs, text)
  if opens is not None:  # where nothing is said, `transformers` 4 puts one and 5 puts none
    assert [*ours.opening, *ours.encode('a b')] == theirs('a b')['input_ids']
  kept = made_of.sentencepiece((), path=str(tmp_path / 'tokenizer.model'), vocab_size=0)
  assert not kept.opening, 'a model of ours has never seen it'
  (tmp_path / 'tokenizer.model').rename(tmp_path / 'spiece.model')
  assert bool(tokens.find(tmp_path, 420).opening) == (opens is True), 'T5 has none'


def test_they_read_what_is_written(theirs, tmp_path):
  _, directory, size = theirs
  ours = tokens.find(directory, size)
  assert tokens.write(ours, tmp_path)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert ids(again, text) == ours.encode(text)
