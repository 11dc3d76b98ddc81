"""Parameter counts equal the published ones.

BERT's are those of the encoder with its pooler, of which the papers give 110M and 340M and the
released checkpoints the exact numbers; GPT-2's are those of its released checkpoints.
"""

import jax
import pytest

from lmjax import config, experiment

# google-research/bert (uncased, vocabulary 30,522, 512 positions, 2 segment types).
BERT = {
  'bert_tiny': 4_385_920,
  'bert_mini': 11_170_560,
  'bert_small': 28_763_648,
  'bert_medium': 41_373_184,
  'bert_base': 109_482_240,
  'bert_large': 335_141_888,
}
# openai/gpt-2 (vocabulary 50,257, 1,024 positions).
GPT2 = {
  'gpt2_small': 124_439_808,
  'gpt2_medium': 354_823_168,
  'gpt2_large': 774_030_080,
  'gpt2_xl': 1_557_611_200,
}


def shapes(spec: str) -> dict:
  parts = experiment.sketch(config.resolve(config.load(spec, {'model.vocab_multiple': 1})))
  boxed = parts.boxed_shapes
  return jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda x: hasattr(x, 'names'))


def count(tree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('size', BERT)
def test_bert(size):
  params = shapes(f'experiments/bert.py:{size.removeprefix("bert_")}')
  encoder = {k: params[k] for k in ('core', 'embed', 'types')}
  pooler = params['classifier']['pooler']
  assert count(encoder) + count(pooler) == BERT[size]


def test_bert_base_with_its_heads():
  assert count(shapes('experiments/bert.py:base')) == 110_106_428  # BertForPreTraining


@pytest.mark.parametrize('size', GPT2)
def test_gpt2(size):
  assert count(shapes(f'experiments/gpt2.py:{size.removeprefix("gpt2_")}')) == GPT2[size]


def test_roberta_base():
  # The published 124,697,433 hold two more positions and a segment type, which are never used.
  assert count(shapes('experiments/roberta.py:base')) == 124_697_433 - 3 * 768
