"""Ours beside `transformers`: the same weights in, the same numbers out.

Weights are drawn wide: with the usual 0.02 a wrong GELU moves BERT's logits by no more than 1e-6.
"""

import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from lmjax import evaluate, experiment, generate, huggingface, sharding
from lmjax.huggingface import weights
from lmjax.models.transformer import Block

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers')
# Threads that wait for each other spin: beside another worker, two took a third longer than one.
torch.set_num_threads(1)

LIMIT = 1e-4
# (layers, dim, heads, feed-forward, vocabulary, positions, key-value heads)
SIZES = [
  (1, 8, 1, 16, 33, 16, 1),
  (3, 36, 3, 70, 97, 40, 3),
  (2, 40, 10, 56, 101, 64, 5),
  (5, 66, 11, 130, 250, 33, 1),
]
KINDS = ('gpt2', 'gpt2 relu', 'llama', 'llama biases', 'bert', 'bert without pooler', 'roberta')
KINDS += ('bert untied', 'roberta untied')


def make(kind: str, size: tuple[int, ...]):
  layers, dim, heads, ffn, vocab, positions, kv_heads = size
  t, of_encoder = transformers, dict(vocab_size=vocab, hidden_size=dim, num_hidden_layers=layers)
  of_encoder |= dict(num_attention_heads=heads, intermediate_size=ffn)
  of_encoder |= dict(bos_token_id=0, eos_token_id=2)
  name, _, variant = kind.partition(' ')
  tied = dict(tie_word_embeddings=variant != 'untied')
  if name == 'gpt2':
    c = t.GPT2Config(
      **dict(vocab_size=vocab, n_positions=positions, n_embd=dim, n_layer=layers, n_head=heads),
      **dict(n_inner=ffn, bos_token_id=0, eos_token_id=0),
      activation_function=variant or 'gelu_new',
      tie_word_embeddings=not variant,
    )
    return t.GPT2LMHeadModel(c)
  if name == 'llama':
    c = t.LlamaConfig(
      **of_encoder,
      **dict(num_key_value_heads=kv_heads, max_position_embeddings=positions),
      **dict(attention_bias=bool(variant), mlp_bias=bool(variant), rms_norm_eps=1e-4),
      tie_word_embeddings=bool(variant),
      rope_theta=777.0,
    )
    return t.LlamaForCausalLM(c)
  if name == 'bert':
    c = t.BertConfig(**of_encoder, **tied, max_position_embeddings=positions)
    return t.BertForMaskedLM(c) if variant else t.BertForPreTraining(c)
  places = dict(max_position_embeddings=positions + 2, type_vocab_size=1, pad_token_id=1)
  return t.RobertaForMaskedLM(t.RobertaConfig(**of_encoder, **tied, **places))


def widened(model):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
      drawn = torch.randn(parameter.shape, generator=generator) * scale
      parameter.copy_(drawn + (parameter.detach().mean().round() if parameter.ndim == 1 else 0))
  return model.eval()


def paired(kind: str, size: tuple[int, ...], path: pathlib.Path):
  """(kind, theirs, our model, our parameters, where theirs lies)."""
  theirs = widened(make(kind, size))
  theirs.set_attn_implementation('eager')  # which alone says its weights
  theirs.save_pretrained(path, max_shard_size='20kB')
  model, params, tokenizer = huggingface.load(path)
  assert tokenizer is None
  return kind, theirs, model, params, path


@pytest.fixture(scope='module', params=[(k, s) for k in KINDS for s in SIZES], ids=str)
def pair(request, tmp_path_factory):
  return paired(*request.param, tmp_path_factory.mktemp('theirs'))


def inputs(model, kind: str) -> dict[str, np.ndarray]:
  """Two rows, of which an encoder's second has padding."""
  rng, length = np.random.default_rng(0), min(model.core.max_length, 24)
  tokens = rng.integers(3, model.vocab_size, (2, length))
  made = {'tokens_BL': tokens}
  if kind.startswith(('bert', 'roberta')):
    segments = np.ones_like(tokens)
    segments[1, length - 3 :] = 0
    made |= {'segments_BL': segments, 'tokens_BL': np.where(segments, tokens, 1)}
  if kind.startswith('bert'):
    made['types_BL'] = (np.arange(length) > length // 2) * np.ones_like(tokens)
  return made


def of_theirs(theirs, given: dict[str, np.ndarray], **more):
  names = {'tokens_BL': 'input_ids', 'segments_BL': 'attention_mask', 'types_BL': 'token_type_ids'}
  tensors = {names[key]: torch.tensor(x) for key, x in given.items()}
  return theirs(**tensors, **more)


def outputs(pair) -> dict[str, tuple[jax.Array, np.ndarray]]:
  """What a model says -> (ours, theirs), where there is no padding."""
  kind, theirs, model, params, _ = pair
  given = inputs(model, kind)
  with torch.no_grad():
    out = of_theirs(theirs, given, output_hidden_states=True, output_attentions=True)
  apply = lambda method, **more: model.apply({'params': params}, **given, method=method, **more)
  expected = out.prediction_logits if kind == 'bert' else out.logits
  real = given.get('segments_BL', np.ones_like(given['tokens_BL'])) > 0
  found = {'logits': (apply('logits')[real], expected.numpy()[real])}
  of_blocks = lambda module, name: isinstance(module, Block) and name == '__call__'
  last, seen = apply('encode', capture_intermediates=of_blocks)
  found['hidden'] = last[real], out.hidden_states[-1].numpy()[real]
  seen = seen['intermediates']['core']['blocks']
  ((blocks, _),), (weights,) = seen['__call__'], seen['attention']['weights']
  assert len(blocks) == len(weights) == model.core.depth
  # Theirs are what goes into the blocks, and then the last vectors, which a decoder has normed.
  for n, vectors in enumerate(out.hidden_states[1 : None if 'segments_BL' in given else -1]):
    found[f'block {n}'] = blocks[n][real], vectors.numpy()[real]
  in_uniform = lambda x_BNLS: x_BNLS.shape[-1] * np.swapaxes(x_BNLS, 1, 2)[real]
  for n, theirs_of_block in enumerate(out.attentions):
    found[f'attention {n}'] = in_uniform(weights[n]), in_uniform(theirs_of_block.numpy())
  if kind == 'bert':
    pooled, logits = apply('pooled')
    with torch.no_grad():
      hidden = of_theirs(theirs.bert, given)
    found['pooled'] = pooled, hidden.pooler_output.numpy()
    found['classes'] = logits, out.seq_relationship_logits.numpy()
  return found


def test_logits(pair):
  for name, (ours, theirs) in outputs(pair).items():
    close(ours, theirs, name)


def close(ours: jax.Array, theirs: np.ndarray, name: str = 'logits') -> None:
  assert np.abs(theirs).max() > 0.1  # what is nearly nothing is close to anything
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT, err_msg=name)


def gradients(pair) -> tuple[tuple[float, float], dict[str, tuple]]:
  """((our loss, theirs), parameter -> (our gradient, theirs, what a difference is measured by))."""
  kind, theirs, model, params, _ = pair
  given = inputs(model, kind)
  rng = np.random.default_rng(1)
  targets = rng.integers(0, model.vocab_size, given['tokens_BL'].shape)
  chosen = (rng.random(targets.shape) < 0.4) & (given.get('segments_BL', 1) > 0)
  chosen[:, 0] = False  # theirs shifts the targets of a decoder itself
  labels = torch.tensor(np.where(chosen, targets, -100))
  theirs.zero_grad()
  if kind == 'bert':
    follows = torch.tensor([0, 1])
    loss = of_theirs(theirs, given, labels=labels, next_sentence_label=follows).loss
  else:
    loss = of_theirs(theirs, given, labels=labels).loss
  loss.backward()

  batch = batch_of(given, targets, chosen, causal=not kind.startswith(('bert', 'roberta')))

  def ours(params):
    terms, _ = model.apply({'params': params}, batch, train=False)
    return sum(term.total / term.weight for term in terms.values())

  value, found = jax.value_and_grad(ours)(params)
  named = dict(theirs.named_parameters())
  prefix = {'bert': 'bert.', 'gpt2': 'transformer.', 'llama': 'model.', 'roberta': 'roberta.'}
  by_name = {
    name.removeprefix(prefix[kind.split()[0]]): p.grad.numpy()
    for name, p in named.items()
    if p.grad is not None
  }
  flat = traverse_util.flatten_dict(found, sep='/')
  source = huggingface._open(pair[4])
  expected, missing, surplus = weights.taken(
    source.architecture.weights(source.settings['objective'], source.settings['model']),
    {path: x.shape for path, x in flat.items()},
    Arrays(by_name),
    lambda _, x: x,
  )
  assert (missing, [name for name in surplus if 'token_type' not in name]) == ([], [])
  largest = max(np.abs(x).max() for x in expected.values())
  beside = {}
  for path, gradient in flat.items():
    scale = np.abs(expected[path]).max()
    if 'key/bias' in path:  # without rotation it moves all logits of a query alike: nothing
      scale = max(scale, largest / 1000)
    assert scale > largest / 1e5, path
    beside[path] = gradient, expected[path], scale
  return (float(value), loss.item()), beside


def batch_of(given: dict, targets: np.ndarray, chosen: np.ndarray, causal: bool) -> dict:
  """As our objectives make it: of the same inputs and the targets at the chosen places."""
  batch = {name.partition('_')[0]: x for name, x in given.items()}
  if causal:  # the target of a place is the token after it
    return batch | {
      'targets': np.roll(targets, -1, axis=1),
      'weights': np.roll(chosen, -1, axis=1).astype(np.float32),
    }
  most = chosen.sum(axis=1).max()
  places = np.argsort(~chosen, axis=1, kind='stable')[:, :most]
  at_places = lambda x: np.take_along_axis(x, places, axis=1)
  pairs = {'pair_places': [[0], [0]], 'pair_targets': [[0], [1]], 'pair_weights': [[1.0], [1.0]]}
  batch |= {key: np.array(x) for key, x in pairs.items()}
  weights = at_places(chosen).astype(np.float32)
  return batch | {'places': places, 'targets': at_places(targets), 'weights': weights}


def test_losses_and_gradients_of_every_parameter(pair):
  losses, beside = gradients(pair)
  assert losses[0] == pytest.approx(losses[1], rel=LIMIT)
  for path, (ours, theirs, scale) in beside.items():
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT * scale, err_msg=path)


class Arrays(dict):
  """As weights.Files."""

  names, read = dict.keys, dict.__getitem__


def test_the_likeliest_continuation(pair):
  kind, theirs, model, params, _ = pair
  if kind.startswith(('bert', 'roberta')):
    return
  prompt = inputs(model, kind)['tokens_BL'][:, :4]
  asked = dict(do_sample=False, max_new_tokens=12, pad_token_id=0)
  theirs.generation_config.eos_token_id = None
  expected = theirs.generate(torch.tensor(prompt), **asked)[:, 4:].numpy()
  new = generate.continue_tokens(model, params, prompt, jax.random.key(0), 12, temperature=0)
  np.testing.assert_array_equal(new, expected)


def test_the_likeliest_continuation_of_a_text(tmp_path):
  """Which begins as its tokenizer says."""
  theirs = widened(make('llama', SIZES[1]))
  theirs.save_pretrained(tmp_path / 'theirs')
  vocabulary(tmp_path / 'theirs', 'llama', SIZES[1][4], template='<s> $A')
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'theirs')
  huggingface.to_workdir(tmp_path / 'theirs', tmp_path / 'run')
  parts = experiment.open_run(tmp_path / 'run')
  mesh = sharding.mesh_of_run(parts.config, parts.boxed_shapes)
  with jax.set_mesh(mesh):
    _, params = evaluate.restore_params(parts, str(tmp_path / 'run'), mesh)
  given = tokenizer('w1 w2 w3', return_tensors='pt')['input_ids']
  assert given[0, 0] == 0
  theirs.generation_config.eos_token_id = 2
  asked = dict(do_sample=False, max_new_tokens=9, pad_token_id=1)
  expected = theirs.generate(given, **asked)[0]
  ours = generate.continue_text(parts, params, 'w1 w2 w3', 9, temperature=0)
  assert ours == tokenizer.decode(expected, skip_special_tokens=True)
  assert len(ours.split()) > 5
  other = theirs.generate(torch.cat([torch.tensor([[2]]), given[:, 1:]], 1), **asked)[0]
  assert ours != tokenizer.decode(other, skip_special_tokens=True), 'nothing depends on the first'


@pytest.mark.parametrize('kind', KINDS)
def test_they_open_what_is_exported(kind, tmp_path):
  """Imported into a workdir, and written again."""
  theirs = widened(make(kind, SIZES[1]))
  theirs.save_pretrained(tmp_path / 'theirs')
  vocabulary(tmp_path / 'theirs', kind, SIZES[1][4])
  huggingface.to_workdir(tmp_path / 'theirs', tmp_path / 'run')
  huggingface.from_workdir(tmp_path / 'run', tmp_path / 'ours')
  again = type(theirs).from_pretrained(tmp_path / 'ours').eval()
  (model, first, _), (_, second, _) = (huggingface.load(tmp_path / x) for x in ('theirs', 'ours'))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  given = inputs(model, kind)
  with torch.no_grad():
    first, second = of_theirs(theirs, given), of_theirs(again, given)
  name = 'prediction_logits' if kind == 'bert' else 'logits'
  real = given.get('segments_BL', np.ones_like(given['tokens_BL'])) > 0
  close(second[name].numpy()[real], first[name].numpy()[real])
  there = dict(theirs.named_parameters())
  for name, x in again.named_parameters():
    if 'token_type' in name or 'position' in name:  # RoBERTa's are one table here
      continue
    if 'untied' in kind and name in ('cls.predictions.bias', 'lm_head.bias'):  # read by nothing
      continue
    np.testing.assert_array_equal(x.detach().numpy(), there[name].detach().numpy(), err_msg=name)


def vocabulary(directory, kind: str, size: int, template: str = '$A') -> None:
  """A tokenizer of so many words."""
  import tokenizers

  words = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
  words += [f'w{i}' for i in range(size - len(words))]
  ids = {word: i for i, word in enumerate(words)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='<unk>'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(words[:5])
  special = [(word, ids[word]) for word in ('<s>', '</s>')]
  made.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=special)
  made.save(str(directory / 'tokenizer.json'))
