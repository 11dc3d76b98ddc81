"""Decoders like Llama (Touvron et al., 2023): rotary positions, RMSNorm, SwiGLU, kv_heads."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.huggingface.weights import Weight, modules, refuse

PREFIX, HEADS = 'model.', ('lm_head.',)
OPTIONAL = ()
SURPLUS = r'.*rotary_emb\.inv_freq|lm_head\.weight'


def settings(c: Mapping[str, Any], has: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
  """What of our config follows from theirs."""
  refuse(c, {'hidden_act': 'silu', 'partial_rotary_factor': 1.0, 'is_causal': True})
  base = _rotary_base(c)
  dim, heads = c.get('hidden_size', 4096), c.get('num_attention_heads', 32)
  if (head_dim := c.get('head_dim') or dim // heads) * heads != dim:
    raise UserError(f'config.json: head_dim = {head_dim} is not hidden_size / num_attention_heads')
  if c.get('attention_bias', False) != c.get('mlp_bias', False):
    raise UserError(
      'config.json: attention_bias and mlp_bias differ, and here all have one or none'
    )
  return {
    'objective': {'name': 'clm', 'tied': c.get('tie_word_embeddings', False)},
    'model': {
      **{'depth': c.get('num_hidden_layers', 32), 'dim': dim, 'heads': heads},
      'kv_heads': c.get('num_key_value_heads') or heads,
      'ffn_dim': c.get('intermediate_size', 11008),
      'max_length': c.get('max_position_embeddings', 2048),
      **{'positions': 'rotary', 'ffn': 'swiglu', 'norm': 'rmsnorm', 'initializer': 'gpt2'},
      'rotary_base': base,
      'norm_epsilon': float(c.get('rms_norm_eps', 1e-6)),
      'bias': c.get('attention_bias', False),
      'attention_dropout': float(c.get('attention_dropout', 0.0)),
    },
  }


def _rotary_base(c: Mapping[str, Any]) -> float:
  key, also = 'rope_scaling', c.get('rope_parameters')
  rope = c.get(key)
  if not rope:  # the older name goes first, as in `transformers`
    key, rope = 'rope_parameters', also or {}
  if not isinstance(rope, dict):
    raise UserError(f'config.json: {key} is no object')
  if (kind := rope.get('rope_type') or rope.get('type') or 'default') != 'default':
    raise UserError(f'config.json: {key} of type "{kind}", and only "default" is known here')
  refuse(rope, {'partial_rotary_factor': 1.0})
  if odd := sorted(rope.keys() - {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor'}):
    raise UserError(f'config.json: {key} with "{odd[0]}" is not known here')
  given = c.get('rope_theta')
  return float(rope.get('rope_theta') or given or 10_000.0)


def published(objective: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
  """Their config of a run of ours, whose vocabulary and tokenizer are not in it."""
  base = model['rotary_base']
  return {
    **{'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_act': 'silu'},
    **{'num_hidden_layers': model['depth'], 'hidden_size': model['dim']},
    **{'num_attention_heads': model['heads'], 'num_key_value_heads': model['kv_heads']},
    **{'intermediate_size': model['ffn_dim'], 'max_position_embeddings': model['max_length']},
    **{'rope_theta': base, 'rope_parameters': {'rope_type': 'default', 'rope_theta': base}},
    'rms_norm_eps': model['norm_epsilon'],
    **dict.fromkeys(('attention_bias', 'mlp_bias'), model['bias']),
    'attention_dropout': model['attention_dropout'],
    'tie_word_embeddings': objective['tied'],
  }


KNOWN = {  # what a model of ours must be, to be one of theirs
  'objective': {'name': 'clm'},
  'model': {
    **{'positions': 'rotary', 'ffn': 'swiglu', 'norm': 'rmsnorm', 'norm_position': 'pre'},
    **{'embed_norm': False, 'qk_norm': False, 'window': 0},
  },
}


def weights(objective: Mapping[str, Any], model: Mapping[str, Any]) -> list[Weight]:
  layer = 'layers.{}.'
  found = [
    Weight('embed/table', 'embed_tokens.weight'),
    Weight('core/output_norm/scale', 'norm.weight'),
    Weight('core/blocks/attention_pre_norm/scale', f'{layer}input_layernorm.weight'),
    Weight('core/blocks/ffn_pre_norm/scale', f'{layer}post_attention_layernorm.weight'),
    Weight('head/table/table', 'lm_head.weight'),
  ]
  products = {  # the activation is that of our `up`, and of their gate
    **{'attention/query': 'self_attn.q_proj', 'attention/key': 'self_attn.k_proj'},
    **{'attention/value': 'self_attn.v_proj', 'attention/out': 'self_attn.o_proj'},
    **{'ffn/up': 'mlp.gate_proj', 'ffn/gate': 'mlp.up_proj', 'ffn/down': 'mlp.down_proj'},
  }
  names = {f'core/blocks/{ours}': layer + theirs for ours, theirs in products.items()}
  return found + modules(names, transposed=True)


def adjust(name: str, x: np.ndarray, read: Callable[[str], np.ndarray]) -> np.ndarray:
  return x


def complete(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return arrays
