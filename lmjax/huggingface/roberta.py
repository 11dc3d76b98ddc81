"""RoBERTa (Liu et al., 2019): BERT without sentence pairs, whose positions begin at 2."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lmjax.huggingface.weights import Weight, modules, refuse

PREFIX, HEADS = 'roberta.', ('lm_head.',)
OPTIONAL = ('transform', 'head/')
SURPLUS = r'embeddings\.(position_ids|token_type_embeddings\.weight)|lm_head\.(bias|decoder\..*)'
_BIAS, _OWN_BIAS = 'lm_head.bias', 'lm_head.decoder.bias'
FIRST = 2  # position: that of the padding, 1, and one more
_TYPES, _POSITIONS = (f'embeddings.{x}_embeddings.weight' for x in ('token_type', 'position'))


def settings(c: Mapping[str, Any], has: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
  """What of our config follows from theirs."""
  refuse(c, {'hidden_act': 'gelu', 'position_embedding_type': 'absolute', 'is_decoder': False})
  refuse(c, {'pad_token_id': FIRST - 1, 'add_cross_attention': False})
  refuse({'type_vocab_size': c.get('type_vocab_size', 2)}, {'type_vocab_size': 1})
  return {
    'objective': {'name': 'mlm', 'tied': c.get('tie_word_embeddings', True)},
    'model': {
      **{'depth': c.get('num_hidden_layers', 12), 'dim': c.get('hidden_size', 768)},
      'heads': c.get('num_attention_heads', 12),
      'ffn_dim': c.get('intermediate_size', 3072),
      'max_length': c.get('max_position_embeddings', 512) - FIRST,
      **KNOWN['model'],
      'initializer': 'bert',
      'norm_epsilon': float(c.get('layer_norm_eps', 1e-12)),
      'dropout': float(c.get('hidden_dropout_prob', 0.1)),
      'attention_dropout': float(c.get('attention_probs_dropout_prob', 0.1)),
    },
  }


def published(objective: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
  """Their config of a run of ours, whose vocabulary and tokenizer are not in it."""
  return {
    **{'model_type': 'roberta', 'architectures': ['RobertaForMaskedLM'], 'hidden_act': 'gelu'},
    **{'num_hidden_layers': model['depth'], 'hidden_size': model['dim']},
    **{'num_attention_heads': model['heads'], 'intermediate_size': model['ffn_dim']},
    **{'max_position_embeddings': model['max_length'] + FIRST, 'type_vocab_size': 1},
    'layer_norm_eps': model['norm_epsilon'],
    'hidden_dropout_prob': model['dropout'],
    'attention_probs_dropout_prob': model['attention_dropout'],
    **{'tie_word_embeddings': objective['tied'], 'pad_token_id': FIRST - 1},
  }


KNOWN = {  # what a model of ours must be, to be one of theirs
  'tokenizer': {'pad': FIRST - 1},
  'objective': {'name': 'mlm', 'sentence_order': False, 'next_sentence': False, 'types': False},
  'model': {
    **{'positions': 'learned', 'ffn': 'gelu', 'norm': 'layernorm', 'norm_position': 'post'},
    **{'bias': True, 'embed_norm': True, 'qk_norm': False, 'window': 0},
  },
}


def weights(objective: Mapping[str, Any], model: Mapping[str, Any]) -> list[Weight]:
  found = [
    Weight('embed/table', 'embeddings.word_embeddings.weight'),
    Weight('core/position/embed/table', _POSITIONS, skip=FIRST),
    # A table of its own has a bias of its own; files of older versions have it by the first name.
    Weight('head/bias', _BIAS)
    if objective['tied']
    else Weight('head/bias', _OWN_BIAS, other=_BIAS),
    Weight('head/table/table', 'lm_head.decoder.weight'),
  ]
  layer, blocks = 'encoder.layer.{}.', 'core/blocks/'
  norms = {
    'core/input_norm': 'embeddings.LayerNorm',
    f'{blocks}attention_post_norm': f'{layer}attention.output.LayerNorm',
    f'{blocks}ffn_post_norm': f'{layer}output.LayerNorm',
    'transform_norm': 'lm_head.layer_norm',
  }
  products = {
    **{f'{blocks}attention/{x}': f'{layer}attention.self.{x}' for x in ('query', 'key', 'value')},
    f'{blocks}attention/out': f'{layer}attention.output.dense',
    f'{blocks}ffn/up': f'{layer}intermediate.dense',
    f'{blocks}ffn/down': f'{layer}output.dense',
    'transform': 'lm_head.dense',
  }
  return found + modules(norms, 'scale') + modules(products, transposed=True)


def adjust(name: str, x: np.ndarray, read: Callable[[str], np.ndarray]) -> np.ndarray:
  """All tokens are of one type, whose vector ours has in the positions."""
  return x + read(_TYPES) if name == _POSITIONS else x


def complete(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """With zeros for the types; the bias is written by both its names."""
  dim = arrays['embeddings.word_embeddings.weight'].shape[1]
  if _OWN_BIAS in arrays:
    arrays = {_BIAS: arrays[_OWN_BIAS], **arrays}
  return {_TYPES: np.zeros((1, dim), np.float32), **arrays}
