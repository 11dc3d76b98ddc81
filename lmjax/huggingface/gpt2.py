"""GPT-2 (Radford et al., 2019) as `transformers` keeps it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lmjax.huggingface.weights import Weight, activation, modules, refuse
from lmjax.terminal import say

PREFIX, HEADS = 'transformer.', ('lm_head.',)
OPTIONAL = ('head/',)
SURPLUS = r'h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight'
_ACTIVATIONS = {
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu': 'gelu',
  'relu': 'relu',
}
_ALSO = {  # names that `transformers` reads as well, and these go first
  **{'n_layer': 'num_hidden_layers', 'n_embd': 'hidden_size', 'n_head': 'num_attention_heads'},
  'n_positions': 'max_position_embeddings',
}


def settings(c: Mapping[str, Any], has: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
  """What of our config follows from theirs."""
  refuse(c, {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False})
  refuse(c, {'add_cross_attention': False, 'is_causal': True})
  c.get('reorder_and_upcast_attn')  # another order of the same product, which float32 does not need
  size = lambda key, default: c.get(_ALSO[key], c.get(key, default))
  name = c.get('activation_function', 'gelu_new')
  ffn, dim = activation('config.json: activation_function', name, _ACTIVATIONS), size('n_embd', 768)
  dropout, of_embeddings = c.get('resid_pdrop', 0.1), c.get('embd_pdrop', 0.1)
  if dropout != of_embeddings:
    why = f'a run trains with resid_pdrop = {dropout} on embeddings too'
    say(f'config.json: embd_pdrop = {of_embeddings} is not kept: {why}')
  return {
    'objective': {'name': 'clm', 'tied': c.get('tie_word_embeddings', True)},
    'model': {
      **{'depth': size('n_layer', 12), 'dim': dim, 'heads': size('n_head', 12)},
      **{'ffn_dim': c.get('n_inner') or 4 * dim, 'max_length': size('n_positions', 1024)},
      **{'positions': 'learned', 'ffn': ffn, 'initializer': 'gpt2'},
      'norm_epsilon': float(c.get('layer_norm_epsilon', 1e-5)),
      'dropout': float(dropout),
      'attention_dropout': float(c.get('attn_pdrop', 0.1)),
    },
  }


def published(objective: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
  """Their config of a run of ours, whose vocabulary and tokenizer are not in it."""
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  return {
    **{'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel']},
    **{'n_layer': model['depth'], 'n_embd': model['dim'], 'n_head': model['heads']},
    **{'n_inner': model['ffn_dim'], 'n_positions': model['max_length']},
    'activation_function': activation('model.ffn', model['ffn'], names),
    'layer_norm_epsilon': model['norm_epsilon'],
    **dict.fromkeys(('resid_pdrop', 'embd_pdrop'), model['dropout']),
    'attn_pdrop': model['attention_dropout'],
    'tie_word_embeddings': objective['tied'],
  }


KNOWN = {  # what a model of ours must be, to be one of theirs
  'objective': {'name': 'clm'},
  'model': {
    **{'positions': 'learned', 'norm': 'layernorm', 'norm_position': 'pre', 'bias': True},
    **{'embed_norm': False, 'qk_norm': False, 'window': 0},
  },
}


def weights(objective: Mapping[str, Any], model: Mapping[str, Any]) -> list[Weight]:
  found = [
    Weight('embed/table', 'wte.weight'),
    Weight('core/position/embed/table', 'wpe.weight'),
    Weight('head/table/table', 'lm_head.weight'),
  ]
  norms = {
    'core/blocks/attention_pre_norm': 'h.{}.ln_1',
    'core/blocks/ffn_pre_norm': 'h.{}.ln_2',
    'core/output_norm': 'ln_f',
  }
  products = {
    'core/blocks/attention/out': 'h.{}.attn.c_proj',
    'core/blocks/ffn/up': 'h.{}.mlp.c_fc',
    'core/blocks/ffn/down': 'h.{}.mlp.c_proj',
  }
  for ours, theirs in (('kernel', 'weight'), ('bias', 'bias')):
    for i, name in enumerate(('query', 'key', 'value')):
      path = f'core/blocks/attention/{name}/{ours}'
      found.append(Weight(path, f'h.{{}}.attn.c_attn.{theirs}', part=(i, 3)))
  return found + modules(norms, 'scale') + modules(products)


def adjust(name: str, x: np.ndarray, read: Callable[[str], np.ndarray]) -> np.ndarray:
  return x


def complete(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return arrays
