"""Each key of a published config that changes the numbers: the same numbers here, or a refusal."""

import dataclasses
import json

import pytest

from lmjax import huggingface
from lmjax.errors import UserError
from lmjax.huggingface import bert, gpt2, llama, roberta
from lmjax.huggingface.weights import IDLE, Asked
from tests.parity import models_test as models

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers')

ARCHITECTURES = {'gpt2': gpt2, 'llama': llama, 'bert': bert, 'roberta': roberta}
SIZE = (2, 32, 4, 48, 60, 24, 2)
REFUSED, SAME = 'refused', 'the same numbers'
SCALED = {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 777.0}
THETA = {'rope_type': 'default', 'rope_theta': 50.0}
OF_ENCODERS = {
  'hidden_act': {'relu': REFUSED, 'gelu_new': REFUSED, 'silu': REFUSED},
  'layer_norm_eps': {1e-2: SAME},
  'hidden_dropout_prob': {0.3: SAME},
  'attention_probs_dropout_prob': {0.3: SAME},
  'is_decoder': {True: REFUSED},
  'tie_word_embeddings': {False: SAME},
  'initializer_range': {0.1: SAME},
  'chunk_size_feed_forward': {4: SAME},
  'use_cache': {False: SAME},
  'num_attention_heads': {2: SAME},
  'classifier_dropout': {0.5: SAME},
}
TABLE = {  # architecture -> key -> value -> what becomes of it
  'gpt2': {
    'activation_function': {'relu': SAME, 'gelu': SAME, 'gelu_pytorch_tanh': SAME, 'silu': REFUSED},
    'layer_norm_epsilon': {1e-2: SAME},
    'n_head': {2: SAME},
    'n_inner': {None: SAME},
    'embd_pdrop': {0.3: SAME},
    'resid_pdrop': {0.3: SAME},
    'attn_pdrop': {0.3: SAME},
    'scale_attn_weights': {False: REFUSED},
    'scale_attn_by_inverse_layer_idx': {True: REFUSED},
    'reorder_and_upcast_attn': {True: SAME},
    'add_cross_attention': {True: REFUSED},
    'tie_word_embeddings': {False: SAME},
    'initializer_range': {0.1: SAME},
    'is_causal': {False: REFUSED},
    'num_attention_heads': {2: SAME},  # another name of n_head, which wins
    'sliding_window': {4: REFUSED},
    'summary_type': {'mean': SAME},
    'use_cache': {False: SAME},
  },
  'llama': {
    'hidden_act': {'gelu': REFUSED, 'relu': REFUSED},
    'rms_norm_eps': {1e-2: SAME},
    'num_attention_heads': {8: SAME},
    'num_key_value_heads': {1: SAME, 4: SAME, None: SAME},
    'head_dim': {16: REFUSED, 8: SAME, None: SAME},
    'attention_bias': {True: REFUSED},
    'mlp_bias': {True: REFUSED},
    'attention_dropout': {0.3: SAME},
    'pretraining_tp': {2: SAME},
    'rope_parameters': {'default': SAME, 'linear': REFUSED, 'dynamic': REFUSED, 'yarn': REFUSED},
    'tie_word_embeddings': {True: SAME},
    'initializer_range': {0.1: SAME},
    'is_causal': {False: REFUSED},
    'sliding_window': {4: REFUSED},
    'pad_token_id': {3: SAME},
    'use_cache': {False: SAME},
  },
  'bert': OF_ENCODERS | {'type_vocab_size': {1: REFUSED, 3: REFUSED}, 'pad_token_id': {7: SAME}},
  'roberta': OF_ENCODERS | {'type_vocab_size': {2: REFUSED}, 'pad_token_id': {0: REFUSED}},
}
ROWS = [
  (architecture, key, value, expected)
  for architecture, keys in TABLE.items()
  for key, values in keys.items()
  for value, expected in values.items()
]
ROPES = {
  'default': THETA,
  'linear': SCALED,
  'dynamic': SCALED | {'rope_type': 'dynamic'},
  'yarn': SCALED | {'rope_type': 'yarn', 'original_max_position_embeddings': 12},
}


def known_as(key: str, expected: str) -> str:
  return rf'\b{key}\b' if key != 'rope_parameters' else 'rope_parameters|rotary'


@pytest.mark.parametrize(('architecture', 'key', 'value', 'expected'), ROWS)
def test_a_key_is_kept_or_refused(architecture, key, value, expected, tmp_path):
  about = {**models.make(architecture, SIZE).config.to_dict()}
  about[key] = ROPES[value] if key == 'rope_parameters' else value
  if key == 'num_attention_heads' and architecture == 'llama':
    del about['head_dim']
  classes = {
    **{'gpt2': transformers.GPT2LMHeadModel, 'llama': transformers.LlamaForCausalLM},
    **{'bert': transformers.BertForPreTraining, 'roberta': transformers.RobertaForMaskedLM},
  }
  cls = classes[architecture]
  theirs = models.widened(cls(cls.config_class.from_dict(about)))
  theirs.save_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(about))
  if expected == REFUSED:
    with pytest.raises(UserError, match=known_as(key, expected)):
      huggingface.load(tmp_path)
    return
  model, params, _ = huggingface.load(tmp_path)
  models.test_logits((architecture, theirs, model, params, tmp_path))


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_what_a_config_leaves_out_is_theirs(architecture):
  """A key that is not there means here what it means there."""
  cls = type(models.make(architecture, SIZE).config)
  full = {**cls().to_dict(), 'type_vocab_size': 1 if architecture == 'roberta' else 2}
  empty = {key: full[key] for key in ('model_type', 'type_vocab_size') if key in full}
  here = lambda about: ARCHITECTURES[architecture].settings(about, lambda name: True)
  assert here(empty) == here(full)
  assert here(empty)['model'] != here(models.make(architecture, SIZE).config.to_dict())['model']


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_every_key_of_theirs_is_known(architecture):
  """One that a new version adds is looked at here before anybody meets it."""
  config = models.make(architecture, SIZE).config
  asked = Asked(config.to_dict())
  ARCHITECTURES[architecture].settings(asked, lambda name: True)
  known = asked.asked | IDLE | {'is_encoder_decoder'}
  assert sorted({f.name for f in dataclasses.fields(config)} - known) == []
