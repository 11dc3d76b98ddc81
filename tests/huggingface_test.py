"""Weights out and in again: the same bits, and what is wrong with those of others in a sentence."""

import json
import re
import shutil
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from lmjax import config, evaluate, experiment, generate, huggingface, record, sharding, train
from lmjax.data import tokenizer as tokenizer_lib
from lmjax.errors import UserError
from lmjax.huggingface import tokens
from tests.processes_test import spawn

DECODER = {'optimizer.lr': 1e-2}
ENCODER = {'model.norm_position': 'post', 'model.embed_norm': True, 'model.ffn': 'gelu'}
LLAMA = {'model.positions': 'rotary', 'model.ffn': 'swiglu', 'model.norm': 'rmsnorm'}
LLAMA |= {'model.bias': False, 'model.kv_heads': 1, 'model.rotary_base': 500.0}
KINDS = {  # name -> (objective, what its config says, the type in transformers)
  'gpt2': ('clm', DECODER, 'gpt2'),
  'gpt2 untied': ('clm', {'objective.tied': False, 'model.ffn': 'relu'}, 'gpt2'),
  'llama': ('clm', LLAMA | {'objective.tied': False}, 'llama'),
  'llama biases': ('clm', LLAMA | {'model.bias': True, 'model.kv_heads': None}, 'llama'),
  'bert': ('mlm', ENCODER | {'objective.next_sentence': True}, 'bert'),
  'bert without pairs': ('mlm', ENCODER | {'objective.types': True}, 'bert'),
  'bert without types': ('mlm', ENCODER, 'bert'),
  'bert untied': ('mlm', ENCODER | {'objective.tied': False}, 'bert'),
  'roberta': ('mlm', ENCODER | {'model.vocab_multiple': 64}, 'roberta'),
}


@pytest.fixture(scope='module')
def vocabularies(corpus):
  """vocabularies(kind) -> the section `tokenizer` of a config."""
  import tokenizers

  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  texts = (corpus / 'train.txt').read_text().splitlines()
  specials = {'gpt2': ['<|endoftext|>'], 'roberta': ['<s>', '<pad>', '</s>', '<unk>', '<mask>']}
  for kind, special in specials.items():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    shown = dict(show_progress=False, initial_alphabet=sorted(alphabet))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, **shown)
    made.train_from_iterator(texts, trainer)
    made.save(str(corpus / f'{kind}.json'))

  def of(kind):
    if kind.startswith('bert'):
      return {'name': 'wordpiece', 'vocab_size': 150}
    name = 'roberta' if kind == 'roberta' else 'gpt2'
    return {'name': 'published', 'path': str(corpus / f'{name}.json')}

  return of


@pytest.fixture(scope='module')
def trained(tiny, vocabularies, tmp_path_factory):
  """trained(kind) -> the workdir of a short run, made once."""
  made = {}

  def make(kind):
    if kind not in made:
      made[kind] = tmp_path_factory.mktemp('run') / 'run'
      objective, own, _ = KINDS[kind]
      c = config.base(objective, tokenizer=vocabularies(kind)['name'])
      small = {key: x for key, x in tiny(objective).items() if key not in ('tokenizer', 'data')}
      with c.unlocked():
        c.update(small)
        c.data.update({**tiny(objective)['data'], 'eval': {}})
        c.data.eval = tiny(objective)['data']['eval']  # alone: an update would keep the default's
        c.tokenizer.update(vocabularies(kind))
        c.update_from_flattened_dict(own)
      train.run(config.resolve(c), str(made[kind]))
    return made[kind]

  return make


def params_of(workdir):
  parts = experiment.open_run(workdir)
  mesh = sharding.mesh_of_run(parts.config, parts.boxed_shapes)
  with jax.set_mesh(mesh):
    return parts, jax.device_get(evaluate.restore_params(parts, str(workdir), mesh)[1])


def flat(params):
  return traverse_util.flatten_dict(params, sep='/')


@pytest.mark.parametrize('kind', KINDS)
def test_out_and_in_again_are_the_same_bits(trained, tiny, tmp_path, kind, capfd):
  run, data = trained(kind), tiny()['data']
  huggingface.from_workdir(run, tmp_path / 'out')
  about = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert about['model_type'] == KINDS[kind][2]
  modes = {
    (tmp_path / 'out' / name).stat().st_mode for name in ('model.safetensors', 'config.json')
  }
  assert len(modes) == 1
  own = {'data.train': data['train'], 'data.eval': data['eval'], 'data.document': 'line'}
  own |= {'cache': tiny()['cache'], 'length': 48, 'batch': 8}
  huggingface.to_workdir(tmp_path / 'out', tmp_path / 'in', own)
  huggingface.from_workdir(tmp_path / 'in', tmp_path / 'again')
  assert capfd.readouterr().err == ''
  for name in ('model.safetensors', 'config.json'):
    first, second = ((tmp_path / at / name).read_bytes() for at in ('out', 'again'))
    assert first == second, name
  (parts, there), (_, here) = params_of(run), params_of(tmp_path / 'in')
  _, loaded, tokenizer = huggingface.load(tmp_path / 'out')
  assert tokenizer.fingerprint == params_of(tmp_path / 'in')[0].tokenizer.fingerprint
  for path, x in flat(there).items():
    cut = x[: parts.vocab_size] if path in ('embed/table', 'head/bias') else x
    np.testing.assert_array_equal(cut, flat(here)[path], err_msg=path)
    np.testing.assert_array_equal(cut, flat(loaded)[path], err_msg=path)
  numbers = evaluate.run(tmp_path / 'in')
  assert numbers['step'] == 0
  if kind.startswith('gpt2'):  # the tokenizer is the same object, and so are the numbers
    then = evaluate.run(run)
    assert numbers['eval/valid/loss'] == pytest.approx(then['eval/valid/loss'], rel=1e-5)


@pytest.mark.parametrize(
  ('template', 'begins'),
  [('$A', 1), ('$A </s>', 1), ('<s> $A </s>', 0)],  # by default, the end of the text before it
)
def test_a_prompt_begins_as_its_tokenizer_says(tmp_path, template, begins):
  import tokenizers

  ids = {'<s>': 0, '</s>': 1, 'a': 2, '<unk>': 3}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token='<unk>'))
  made.add_special_tokens(['<s>', '</s>'])
  ends = [('<s>', 0), ('</s>', 1)]
  made.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=ends)
  made.save(str(tmp_path / 'tokenizer.json'))
  tokens.find(tmp_path, 4).save(tmp_path / 'saved')  # as it is kept in a workdir
  tokenizer = tokenizer_lib.load(tmp_path / 'saved')
  assert tokenizer.encode('a') == [2]
  parts = types.SimpleNamespace(tokenizer=tokenizer, core=types.SimpleNamespace(positions='rotary'))
  assert generate.encode_prompt(parts, 'a')[0] == [begins, 2]


def test_an_imported_run_trains_and_writes(trained, tiny, tmp_path, capfd):
  huggingface.from_workdir(trained('gpt2'), tmp_path / 'out')
  keys = ('steps', 'batch', 'length', 'cache', 'log.', 'data.train', 'data.document', 'optimizer.')
  own = {key: x for key, x in record.flatten(tiny()).items() if key.startswith(keys)}
  own |= {'data.eval': tiny()['data']['eval'], 'optimizer.args': {}}
  huggingface.to_workdir(tmp_path / 'out', tmp_path / 'in', own)
  file = str(tmp_path / 'in' / 'experiment.py')
  begun = train.run(config.load(file, {'init_from': str(tmp_path / 'in')}), str(tmp_path / 'new'))
  result = train.run(config.load(file), str(tmp_path / 'in'))
  assert begun['params_fingerprint'] == result['params_fingerprint']
  assert 'resuming' not in capfd.readouterr().out
  assert result['step'] == 6
  parts, params = params_of(tmp_path / 'in')
  assert generate.continue_text(parts, params, 'the river', 5).startswith('the river')


@pytest.fixture
def published(trained, tmp_path):
  """published(kind) -> a directory as `transformers` writes it."""

  def make(kind='gpt2'):
    huggingface.from_workdir(trained(kind), tmp_path / 'out')
    return tmp_path / 'out'

  return make


def change(directory, act):
  arrays = safetensors.numpy.load_file(directory / 'model.safetensors')
  arrays = act(arrays) or arrays
  safetensors.numpy.save_file(arrays, directory / 'model.safetensors')


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_are_read_as_float32(trained, published, dtype):
  directory, there = published(), flat(params_of(trained('gpt2'))[1])
  change(directory, lambda arrays: {name: x.astype(dtype) for name, x in arrays.items()})
  for path, x in flat(huggingface.load(directory)[1]).items():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, there[path].astype(dtype).astype(np.float32))


def test_a_bias_by_its_older_name(published, capsys):
  """Of an encoder with an output table of its own."""
  directory = published('bert untied')
  there = flat(huggingface.load(directory)[1])
  change(directory, harmed('cls.predictions.bias', lambda x: x + 1))
  np.testing.assert_array_equal(
    flat(huggingface.load(directory)[1])['head/bias'], there['head/bias']
  )
  change(directory, lambda a: {k: x for k, x in a.items() if 'decoder.bias' not in k})
  found = flat(huggingface.load(directory)[1])['head/bias']
  np.testing.assert_array_equal(found, there['head/bias'] + 1)
  assert capsys.readouterr().err == ''


def test_several_files_and_names_without_a_prefix(published):
  directory = published()
  there = flat(huggingface.load(directory)[1])
  arrays = safetensors.numpy.load_file(directory / 'model.safetensors')
  arrays = {name.removeprefix('transformer.'): x for name, x in arrays.items()}
  (directory / 'model.safetensors').unlink()
  places = {name: f'model-{i % 2}.safetensors' for i, name in enumerate(arrays)}
  for file in set(places.values()):
    part = {name: x for name, x in arrays.items() if places[name] == file}
    safetensors.numpy.save_file(part, directory / file)
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': places}))
  for path, x in flat(huggingface.load(directory)[1]).items():
    np.testing.assert_array_equal(x, there[path])
  for wrong in ('../out/model-0.safetensors', '/etc/passwd', 'model-0.bin', 7):
    index.write_text(json.dumps({'weight_map': places | {'wte.weight': wrong}}))
    with pytest.raises(UserError, match=r'weight_map|is no file beside it'):
      huggingface.load(directory)
  index.write_text(json.dumps({'weight_map': places | {'wte.weight': 'model-9.safetensors'}}))
  with pytest.raises(UserError, match=r'model-9.safetensors cannot be read'):
    huggingface.load(directory)


def test_what_is_surplus_or_may_be_missing_is_said(published, capsys):
  directory = published('bert')

  def act(arrays):
    gone = {'cls.seq_relationship.weight', 'cls.seq_relationship.bias'}
    kept = {name: x for name, x in arrays.items() if name not in gone}
    more = ('bert.extra', 'bert.embeddings.position_ids')
    return kept | {name: np.zeros(3, np.float32) for name in more}

  change(directory, act)
  params = flat(huggingface.load(directory)[1])
  said = capsys.readouterr().err
  assert 'has no cls.seq_relationship.bias, cls.seq_relationship.weight: what is made' in said
  assert 'also has extra, which is not used' in said
  assert np.std(params['classifier/classes/kernel']) > 0


def harmed(name, value):
  return lambda arrays: {**arrays, name: value(arrays[name])}


MISTAKES = {
  'no model': (lambda d: shutil.rmtree(d), 'it has no config.json'),
  'another type': (lambda d: said(d, model_type='gpt3'), r'type "gpt3" are not known.*"gpt2"'),
  'no weights': (lambda d: (d / 'model.safetensors').unlink(), 'has no model.safetensors'),
  'cut off': (lambda d: cut(d / 'model.safetensors'), 'cannot be read'),
  'an array is missing': (
    lambda d: change(d, lambda a: {k: x for k, x in a.items() if 'h.1.ln_1.weight' not in k}),
    r'has no h.1.ln_1.weight, of which core/blocks/attention_pre_norm/scale is made',
  ),
  'another shape': (
    lambda d: change(d, harmed('transformer.wpe.weight', lambda x: x[:, 1:].copy())),
    'wpe.weight is 48x15, and core/position/embed/table is to be 48x16',
  ),
  'transposed': (
    lambda d: change(d, harmed('transformer.h.0.mlp.c_fc.weight', lambda x: x.T.copy())),
    'h.0.mlp.c_fc.weight is 64x16, and core/blocks/ffn/up/kernel is to be 16x64',
  ),
  'integers': (
    lambda d: change(d, harmed('transformer.ln_f.bias', lambda x: x.astype(np.int32))),
    'ln_f.bias is of type int32',
  ),
  'absurdly deep': (lambda d: said(d, n_layer=10**6), 'has no weights of 1000000 layers'),
  'absurdly wide': (lambda d: said(d, n_embd=1 << 40), 'dim = 1099511627776'),
  'no number': (lambda d: said(d, n_head='two'), 'n_head|heads'),
  'no width': (lambda d: said(d, n_embd=None, n_inner=None), 'of the wrong kind'),
  'no vocabulary': (lambda d: said(d, vocab_size=None), 'config.json: vocab_size = None'),
  'an empty vocabulary': (lambda d: said(d, vocab_size=0), 'config.json: vocab_size = 0'),
  'another activation': (lambda d: said(d, activation_function='mish'), '"mish" is none of gelu'),
  'another attention': (
    lambda d: said(d, scale_attn_by_inverse_layer_idx=True),
    'scale_attn_by_inverse_layer_idx = true, and only false',
  ),
  'a window': (lambda d: said(d, sliding_window=4096), 'sliding_window = 4096, and only null'),
  'quantized': (
    lambda d: said(d, quantization_config={'bits': 4, 'names': ['x'] * 999}),
    'quantization_config = {"bits": 4',
  ),
  'both ways': (lambda d: said(d, is_causal=False), 'is_causal = false, and only true'),
  'an encoder too': (lambda d: said(d, is_encoder_decoder=True), 'is_encoder_decoder = true'),
  'no epsilon': (lambda d: said(d, layer_norm_epsilon='small'), 'of the wrong kind'),
  'an absurd epsilon': (lambda d: said(d, layer_norm_epsilon=10**400), 'of the wrong kind'),
  'another vocabulary': (lambda d: said(d, vocab_size=99), 'wte.weight is'),
  'damaged config': (lambda d: (d / 'config.json').write_bytes(b'{'), 'is damaged'),
}


MISTAKES_OF_OTHERS = [  # a kind, what its config says, what is said to that
  ('bert', {'position_embedding_type': 'relative_key'}, 'position_embedding_type = "relative_key"'),
  ('bert', {'is_decoder': True}, 'is_decoder = true'),
  ('bert', {'type_vocab_size': 3}, 'type_vocab_size = 3'),
  ('bert', {'hidden_act': 'gelu_new'}, 'hidden_act = "gelu_new"'),
  ('roberta', {'position_embedding_type': 'relative_key_query'}, 'position_embedding_type'),
  ('roberta', {'pad_token_id': 0}, 'pad_token_id = 0, and only 1'),
  ('llama', {'head_dim': 3}, 'head_dim = 3 is not hidden_size / num_attention_heads'),
  ('llama', {'head_dim': None, 'num_attention_heads': 3}, 'head_dim = 5 is not hidden_size'),
  ('llama', {'mlp_bias': True}, 'attention_bias and mlp_bias differ'),
  ('llama', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'rope_scaling of type "linear"'),
  ('llama', {'rope_scaling': {'rope_type': 'llama3'}}, 'rope_scaling of type "llama3"'),
  ('llama', {'rope_parameters': {'rope_type': 'yarn'}}, 'rope_parameters of type "yarn"'),
  ('llama', {'rope_parameters': {'full_attention': {}}}, 'rope_parameters with "full_attention"'),
  ('llama', {'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor = 0.5'),
  ('llama', {'rope_parameters': 'linear'}, 'rope_parameters is no object'),
  ('llama', {'rope_parameters': {'rope_theta': 'x'}}, 'of the wrong kind'),
  ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
]


@pytest.mark.parametrize(('kind', 'changes', 'words'), MISTAKES_OF_OTHERS)
def test_what_ours_cannot_do_is_refused_by_name(published, kind, changes, words):
  directory = published(kind)
  said(directory, **changes)
  with pytest.raises(UserError, match=re.escape(words)):
    huggingface.load(directory)


def test_what_is_not_kept_of_a_config_is_said(published, capsys):
  directory = published()
  said(directory, embd_pdrop=0.3, resid_pdrop=0.2, auto_map={'x': 'y'}, router=None, use_cache=True)
  model, _, _ = huggingface.load(directory)
  assert model.core.dropout == 0.2
  assert capsys.readouterr().err.splitlines() == [
    'lmjax: config.json: embd_pdrop = 0.3 is not kept: a run trains with resid_pdrop = 0.2 on '
    'embeddings too',
    f'lmjax: {directory}/config.json also says auto_map, which is not read here',
  ]


def said(directory, **changes):
  about = json.loads((directory / 'config.json').read_text())
  (directory / 'config.json').write_text(json.dumps(about | changes))


def cut(path):
  path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_sentences(published, name):
  directory = published()
  harm, words = MISTAKES[name]
  harm(directory)
  with pytest.raises(UserError, match=words) as e:
    huggingface.load(directory)
  assert len(str(e.value)) < 600


@pytest.mark.parametrize(
  ('own', 'says'),
  [
    ({'model.positions': 'alibi'}, "gpt2 has no model.positions = 'alibi'"),
    ({'model.qk_norm': True}, 'gpt2 has no model.qk_norm = True'),
  ],
)
def test_what_nobody_else_has_is_not_exported(tiny, tmp_path, own, says):
  train.run(tiny('clm', **{'steps': 3, **own}), str(tmp_path / 'run'))
  with pytest.raises(UserError, match=re.escape(says)):
    huggingface.from_workdir(tmp_path / 'run', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_nothing_is_written_over(published, tmp_path):
  directory = published()
  with pytest.raises(UserError, match='is not empty'):
    huggingface.to_workdir(directory, directory)
  (directory / 'tokenizer.json').unlink()
  files = 'tokenizer.json or vocab.txt or vocab.json with merges.txt or .* or tokenizer.model or'
  with pytest.raises(UserError, match=f'there is no tokenizer in .*out: copy .* {files}'):
    huggingface.to_workdir(directory, tmp_path / 'in')
  assert not (tmp_path / 'in').exists()


@pytest.mark.parametrize('kind', ['sentencepiece', 'bytes'])
def test_a_tokenizer_that_others_do_not_have(tiny, tmp_path, capsys, kind):
  own = {'name': kind} | ({'vocab_size': 340} if kind == 'sentencepiece' else {})
  c = config.base('clm', tokenizer=kind).tokenizer.to_dict() | own
  train.run(tiny(steps=3, tokenizer=c), str(tmp_path / 'run'))
  capsys.readouterr()
  huggingface.from_workdir(tmp_path / 'run', tmp_path / 'out')
  said = capsys.readouterr().err
  assert f'`transformers` has no tokenizer like "{kind}": none is written' in said
  if kind == 'bytes':
    assert said.endswith('; and `import` needs one\n')
    return
  kept, where = re.search(r'; copy (\S+) to (\S+) before you `import` it\n', said).groups()
  shutil.copy(kept, where)
  huggingface.to_workdir(tmp_path / 'out', tmp_path / 'in')
  (was, _), (now, _) = (params_of(tmp_path / name) for name in ('run', 'in'))
  assert now.tokenizer.fingerprint == was.tokenizer.fingerprint


def test_the_command(published, tmp_path):
  directory = published()
  process = spawn(['-m', 'lmjax.huggingface', 'import', str(directory), str(tmp_path / 'in')])
  said, errors = process.communicate(timeout=120)
  assert (process.returncode, errors) == (0, '')
  assert said == f'{tmp_path / "in"} is made of {directory}\n'
  process = spawn(['-m', 'lmjax.huggingface', 'import', str(directory)])
  _, errors = process.communicate(timeout=120)
  assert (process.returncode, errors) == (2, 'lmjax: say `import SRC DIR` or `export DIR DST`\n')
