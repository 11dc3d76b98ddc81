"""Tokens per second of the train step on a CPU, float32: our GPT and BERT beside PyTorch's.

python tests/benchmarks/train_step.py --torch PYTHON --nanogpt DIR [--models gpt] [--rounds 5]

gpt: nanoGPT's model.py and its configure_optimizers, eager.  bert: Hugging Face BertForPreTraining,
sdpa, eager, which decodes all positions where we decode the 20 that are predicted.  Sizes, batch,
random data, AdamW and the clip at 1 are the same on both sides, and there is no dropout.

Our step is the one of train.run, compiled and with donated buffers as there, in the environment of
lmjax.main.  A case runs in a process of its own, on all cores; the order turns from round to round.
Printed are medians of the rounds and of their ratios, ours to the peer's.  CPU seconds are of all
threads: they say more where others use the machine.  start_seconds ends with the first step.
--dtype is that of our products; the peers stay float32.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCAB, DEPTH, DIM, HEADS = 8192, 6, 384, 6
SHAPES = {'gpt': (16, 256), 'bert': (32, 128)}  # rows, tokens in a row
PREDICTIONS = 20
WARM = 2  # steps before the clock, the first of which compiles
ADAMW = dict(lr=1e-4, b1=0.9, b2=0.95, weight_decay=0.1)


def random_batch(model: str) -> dict[str, np.ndarray]:
  """int64 tokens, and what is predicted; the ids leave out the first, which are special in BERT."""
  rng, shape = np.random.default_rng(0), SHAPES[model]
  ids = lambda *size: rng.integers(5, VOCAB, size)
  if model == 'gpt':
    return {'tokens': ids(*shape), 'targets': ids(*shape)}
  places = np.sort([rng.permutation(shape[1])[:PREDICTIONS] for _ in range(shape[0])])
  types = np.repeat([np.arange(shape[1]) > shape[1] // 2], shape[0], axis=0).astype(np.int64)
  batch = {'tokens': ids(*shape), 'places': places, 'targets': ids(shape[0], PREDICTIONS)}
  return batch | {'types': types, 'pair_targets': rng.integers(0, 2, (shape[0], 1))}


# ------------------------------------- the cases: what is known of them, and step() -> the loss


def lmjax(model: str, dtype: str, overrides: dict) -> tuple[dict[str, float], Callable[[], float]]:
  import jax

  from lmjax import config, experiment, sharding, train

  c = config.base(objective={'gpt': 'clm', 'bert': 'mlm'}[model], tokenizer='wordpiece')
  c.batch, c.length = SHAPES[model]
  c.tokenizer.vocab_size = VOCAB
  c.model.update(depth=DEPTH, dim=DIM, heads=HEADS, scan=False, dtype=dtype)
  if model == 'bert':
    c.objective.update(next_sentence=True, predictions=PREDICTIONS)
    c.model.update(initializer='bert', ffn='gelu', norm_position='post', embed_norm=True)
  c.optimizer.update(schedule='constant', clip=1.0, **ADAMW)
  with c.unlocked():
    c.update_from_flattened_dict(overrides)
  parts = experiment.sketch(config.resolve(c))
  mesh, strategy = sharding.make_mesh(), c.sharding.strategy
  with jax.set_mesh(mesh), sharding.logical_axes(strategy):
    like, transform, make_state = train.init_state(parts, mesh)
    began = time.perf_counter()
    compiled = train.lower(parts, mesh, like, transform).compile()
    known = {'compile_seconds': time.perf_counter() - began}
    state = make_state()
  shapes = parts.abstract_batch()
  batch = {key: np.ones(x.shape, x.dtype) for key, x in shapes.items()}  # weights and segments
  made = random_batch(model) | ({'pair_places': np.zeros((c.batch, 1))} if model == 'bert' else {})
  batch |= {key: x.astype(shapes[key].dtype) for key, x in made.items()}
  batch = parts.place(batch, mesh)

  def step() -> float:
    nonlocal state
    state, numbers = compiled(state, batch)
    return sum(float(total) / float(weight) for total, weight in numbers['terms'].values())

  return {'parameters': sum(x.size for x in jax.tree.leaves(like.params)), **known}, step


def torch_step(model, optimizer, loss_of: Callable) -> tuple[dict[str, float], Callable[[], float]]:
  import torch

  def step() -> float:
    loss = loss_of()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return {'parameters': sum(p.numel() for p in model.parameters())}, step


def nanogpt(checkout: str) -> tuple[dict[str, float], Callable[[], float]]:
  import torch

  sys.path.insert(0, checkout)
  from model import GPT, GPTConfig

  sizes = dict(n_layer=DEPTH, n_head=HEADS, n_embd=DIM, vocab_size=VOCAB)
  model = GPT(GPTConfig(block_size=SHAPES['gpt'][1], dropout=0.0, **sizes))
  betas = (ADAMW['b1'], ADAMW['b2'])
  optimizer = model.configure_optimizers(ADAMW['weight_decay'], ADAMW['lr'], betas, 'cpu')
  tokens, targets = (torch.tensor(random_batch('gpt')[key]) for key in ('tokens', 'targets'))
  return torch_step(model, optimizer, lambda: model(tokens, targets)[1])


def hugging_face() -> tuple[dict[str, float], Callable[[], float]]:
  import torch
  from transformers import BertConfig, BertForPreTraining

  rows, length = SHAPES['bert']
  sizes = dict(num_hidden_layers=DEPTH, hidden_size=DIM, num_attention_heads=HEADS)
  sizes |= dict(intermediate_size=4 * DIM, vocab_size=VOCAB, max_position_embeddings=length)
  none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
  model = BertForPreTraining(BertConfig(**sizes, **none, attn_implementation='sdpa')).train()
  betas = (ADAMW['b1'], ADAMW['b2'])
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=ADAMW['lr'], betas=betas, weight_decay=ADAMW['weight_decay']
  )
  batch = {key: torch.tensor(x) for key, x in random_batch('bert').items()}
  labels = torch.full((rows, length), -100).scatter_(1, batch['places'], batch['targets'])
  inputs = dict(input_ids=batch['tokens'], token_type_ids=batch['types'], labels=labels)
  inputs |= dict(attention_mask=torch.ones_like(labels), next_sentence_label=batch['pair_targets'])
  return torch_step(model, optimizer, lambda: model(**inputs).loss)


# ------------------------------------------------------------------------------------ the measure


def measure(known: dict[str, float], step: Callable[[], float], steps: int) -> dict[str, float]:
  """In the process of a case: what is known of it, and medians of its steps."""
  losses = [step()]
  result = known | {'loss': losses[0], 'first_step': time.time()}
  wall, cpu = [], []
  for i in range(1, WARM + steps):
    began, cpu_began = time.perf_counter(), time.process_time()
    losses.append(step())
    if i >= WARM:
      wall.append(time.perf_counter() - began)
      cpu.append(time.process_time() - cpu_began)
  result |= {'seconds': statistics.median(wall), 'cpu_seconds': statistics.median(cpu)}
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  return result | {'last_loss': losses[-1], 'peak_mib': peak}


def run(python: str, case: str, a: argparse.Namespace) -> dict[str, float]:
  """Measures a case in a fresh process."""
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  flags = ['--case', case, '--steps', str(a.steps), '--dtype', a.dtype, '--set', *a.set]
  flags += ['--nanogpt', os.path.abspath(a.nanogpt)]
  began = time.time()
  got = subprocess.run([python, __file__, *flags], env=environment, capture_output=True, text=True)
  assert got.returncode == 0, got.stderr
  result = json.loads(got.stdout.splitlines()[-1])
  rows, length = SHAPES[case.split()[-1]]
  result['start_seconds'] = result.pop('first_step') - began
  return {'tokens_per_second': rows * length / result['seconds'], **result}


def compare(model: str, a: argparse.Namespace) -> dict[str, dict[str, float]]:
  peer = {'gpt': 'nanogpt gpt', 'bert': 'hugging_face bert'}[model]
  cases = {f'lmjax {model}': sys.executable, peer: a.torch}
  runs = {case: [] for case in cases}
  for turn in range(a.rounds):
    for case in list(cases)[:: -1 if turn % 2 else 1]:
      runs[case].append(run(cases[case], case, a))
      print(case, json.dumps(runs[case][-1]), file=sys.stderr, flush=True)
  median = lambda values: float(f'{statistics.median(values):.4g}')
  result = {case: {k: median(r[k] for r in got) for k in got[0]} for case, got in runs.items()}
  ours, theirs = runs.values()
  ratios = lambda k: [y[k] / x[k] for x, y in zip(ours, theirs, strict=True)]
  keys = {'tokens_per_second': 'seconds', 'per_cpu_second': 'cpu_seconds'}
  return result | {'ratio': {name: median(ratios(k)) for name, k in keys.items()}}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--torch', help='a Python with torch and transformers')
  parser.add_argument('--nanogpt', default='', help='a checkout of karpathy/nanoGPT')
  parser.add_argument('--models', nargs='+', default=list(SHAPES), choices=SHAPES)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument(
    '--set', nargs='*', default=[], help='knobs of our config in JSON: model.scan=true'
  )
  parser.add_argument('--case', help=argparse.SUPPRESS)
  a = parser.parse_args()
  if not a.case:
    for model in a.models:
      print(json.dumps(compare(model, a), indent=2), flush=True)
    return
  program, model = a.case.split()
  if program == 'lmjax':
    from lmjax.command import keep_freed_memory

    keep_freed_memory()
  overrides = {k: json.loads(v) for k, v in (x.split('=', 1) for x in a.set)}
  makers = {
    'lmjax': lambda: lmjax(model, a.dtype, overrides),
    'nanogpt': lambda: nanogpt(a.nanogpt),
    'hugging_face': hugging_face,
  }
  print(json.dumps(measure(*makers[program](), a.steps)))


if __name__ == '__main__':
  main()
