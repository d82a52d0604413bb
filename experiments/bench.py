r"""Seconds per gradient evaluation of an attack: `python -m experiments.bench`, or `make bench`.

Times the library's attack step (CAM: one first-order gradient of the joint loss by the image;
GRAD: a second-order one) beside an eager PyTorch loop that does the same step. Both sides take
turns in one process, so that other load hits them alike; the ratio is the median over the turns of
torch's time by ours. The first gradients are compared too: it is the same step. Without PyTorch
(extra `bench`) the library is timed alone.

Also prints the matrix products' own speed, and the share of it that the step reaches, counting the
forward pass's multiplications and additions once per network pass; and the memory that the compiled
step takes, weights included. The steps of the two attacks on MASK (`--steps mask,alternation` with
`--looks 1,4,16`) are compiled for their memory alone: both solve for masks, which takes minutes.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adv2_jax import images, interpreters, nets, validate
from adv2_jax.attacks import perturbations
from adv2_jax.attacks.loop import adv2, run_chunk
from adv2_jax.attacks.mask_alternation import adv2_mask
from adv2_jax.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, from_linen
from adv2_jax.types import Attack, Batch, InputError, PyTree
from adv2_jax.validate import whole_number
from adv2_jax.weights import zoo
from adv2_jax.workdir import store
from experiments import _flags, _setup

EPSILON, ALPHA, WEIGHT = 0.031, 1 / 255, 5.0
CHUNK = 4  # gradient evaluations per measurement
SOLVED = ('mask', 'alternation')  # steps that solve for masks


def random_variables(module: Any, image_size: int) -> PyTree:
  """Random weights whose batch-norm statistics fit them, so that activations are of order 1."""
  noise = jax.random.uniform(jax.random.key(1), (8, image_size, image_size, 3), minval=-2, maxval=2)

  def make(key: jax.Array) -> PyTree:
    variables = module.init(key, noise[:1])
    _, moved = module.apply(variables, noise, train=True, mutable=['batch_stats'])
    of_batch = lambda new, old: (new - 0.9 * old) / 0.1  # noqa: E731  # momentum 0.9
    stats = jax.tree.map(of_batch, moved['batch_stats'], variables['batch_stats'])
    return {**variables, 'batch_stats': stats}

  return jax.jit(make)(jax.random.key(0))


def make_batch(n: int, image_size: int, num_classes: int, map_size: int) -> Batch:
  """Random images, targets and target maps."""
  rng = np.random.RandomState(0)
  return Batch(
    example_id=jnp.arange(n),
    x=jnp.asarray(rng.rand(n, image_size, image_size, 3), jnp.float32),
    target=jnp.asarray(rng.randint(0, num_classes, n), jnp.int32),
    target_map=jnp.asarray(rng.rand(n, map_size, map_size), jnp.float32),
    is_real=jnp.ones(n, bool),
  )


def make_attack(clf: Classifier, step: str, looks: int = 1) -> Attack:
  """The attack whose step is measured: PGD on cross-entropy plus λ times the maps' squared error.

  `looks`: of the attacks on MASK, how many masks or iterations of the solver a step looks at.
  """
  ball, key = perturbations.linf_ball(EPSILON), jax.random.key(0)
  if step == 'alternation':
    return adv2_mask(clf, interpreters.MaskConfig(), ball, key=key, looks=looks)
  interpreter = interpreters.mask(looks=looks) if step == 'mask' else interpreters.build(step)
  return adv2(clf, interpreter, ball, optax.sign_sgd(ALPHA), weight=WEIGHT, key=key)


def compile_steps(
  clf: Classifier, step: str, batch: Batch, looks: int = 1
) -> tuple[Callable[[], None], dict[str, Any]]:
  """(a function that does CHUNK steps, seconds to compile and GiB that it takes)."""

  def run(clf: Classifier, batch: Batch) -> PyTree:
    attacker = make_attack(clf, step, looks)
    state, _ = run_chunk(attacker, batch, attacker.init(batch, None), CHUNK)
    return state.delta

  start = time.perf_counter()
  compiled = jax.jit(run).lower(clf, batch).compile()
  seconds = time.perf_counter() - start
  figures: dict[str, Any] = {'seconds_compile': seconds}
  if need := compiled.memory_analysis():  # not every backend tells
    taken = need.temp_size_in_bytes + need.argument_size_in_bytes + need.output_size_in_bytes
    figures['gib'] = taken / 2**30
  return lambda: jax.block_until_ready(compiled(clf, batch)), figures


def first_gradient(clf: Classifier, step: str, batch: Batch) -> np.ndarray:
  """The loss gradient by the images where the attack starts."""
  keep = optax.stateless(lambda updates, params: updates)

  def run(clf: Classifier, batch: Batch) -> jax.Array:
    everywhere = perturbations.linf_ball(EPSILON)._replace(project=lambda x0, delta: delta)
    attacker = adv2(
      clf, interpreters.build(step), everywhere, keep, weight=WEIGHT, key=jax.random.key(0)
    )
    return attacker.step(batch, attacker.init(batch, None))[0].delta

  return np.asarray(jax.jit(run)(clf, batch))


def torch_side(
  model: str, tensors: Mapping[str, np.ndarray], dtype: str
) -> Callable[..., Any] | None:
  """The same loop in PyTorch, or None where it is not installed."""
  try:
    from experiments import _torch_step
  except ImportError:
    return None
  device = 'cuda' if jax.default_backend() == 'gpu' and _torch_step.has_cuda() else 'cpu'
  return _torch_step.make(model, tensors, IMAGENET_MEAN, IMAGENET_STD, dtype, device)


def take_turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
  """Seconds per gradient evaluation, [repeats] for each side: A, B, A, B."""
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  for turn in range(repeats + 1):
    for name, run in sides.items():
      start = time.perf_counter()
      run()
      if turn:  # the first warms up
        seconds[name].append((time.perf_counter() - start) / CHUNK)
  return {name: np.array(s) for name, s in seconds.items()}


def matmul_flops(n: int, dtype: Any) -> float:
  """Operations per second of an n×n by n×n product, the best of five."""
  a = jax.random.normal(jax.random.key(0), (n, n), dtype)
  product = jax.jit(jnp.matmul)
  best = np.inf
  for _ in range(6):
    start = time.perf_counter()
    jax.block_until_ready(product(a, a))
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best


def forward_flops(clf: Classifier, x: jax.Array) -> float:
  """Operations of one forward pass as XLA counts them: 2 for each multiply-add."""
  cost = jax.jit(clf.apply_fn).lower(clf.params, x).cost_analysis()
  return float((cost or {}).get('flops', np.nan))


def bench(config: Mapping[str, Any]) -> dict[str, Any]:
  """Measures and prints; returns what --out gets."""
  weights, size, dtype = config['weights'], config['image_size'], config['dtype']
  batch_sizes, looks = _positive(config, 'batch_sizes'), _positive(config, 'looks')
  for step in config['steps']:
    if step not in ('cam', 'grad', *SOLVED):
      raise InputError(f'--steps has {step!r}; expected some of cam, grad, {", ".join(SOLVED)}')
  if config['repeats'] < 1 or size < 64:
    raise InputError(
      f'--repeats is {config["repeats"]}, --image_size {size}; expected ≥ 1 and ≥ 64'
    )
  _setup.set_precision(dtype)
  module = nets.build(config['model'], dtype=jnp.bfloat16 if dtype == 'bfloat16' else None)
  if weights:
    variables = zoo.load_variables(module, zoo.read_tensors(weights), weights)
  else:
    variables = random_variables(module, size)
  clf = from_linen(module, variables)
  rival = torch_side(config['model'], zoo.to_tensors(variables), dtype)
  if rival is None:
    print("PyTorch is not installed (pip install '.[bench]'): the library is timed alone")

  on_cpu = jax.default_backend() == 'cpu'
  ceilings = {
    name: matmul_flops(2048 if on_cpu else 8192, name)
    for name in (['float32'] if on_cpu else ['float32', 'bfloat16'])
  }
  for name, flops in ceilings.items():
    print(f'matrix product, {name}: {flops / 1e12:.3f} Tflop/s')

  rows = []
  for step in config['steps']:
    for n in batch_sizes:
      for k in looks if step in SOLVED else [None]:
        rows.append(measure(clf, step, n, size, k, config['repeats'], rival, ceilings.get(dtype)))
        print(table(rows[-1:], header=len(rows) == 1), flush=True)
  return {
    'config': dict(config),
    'environment': {
      'jax': jax.__version__,
      'torch': sys.modules['torch'].__version__ if rival else None,
      'device': jax.devices()[0].device_kind,
      'machine': platform.machine(),
      'cores': os.cpu_count(),
    },
    'matmul_flops': ceilings,
    'rows': rows,
  }


def measure(
  clf: Classifier,
  step: str,
  n: int,
  size: int,
  looks: int | None,
  repeats: int,
  rival: Callable[..., Any] | None,
  ceiling: float | None,
) -> dict[str, Any]:
  """One row: the step at batch size n; with `looks`, an attack on MASK, which is not timed."""
  x, y = np.zeros((1, size, size, 3), np.float32), np.zeros(1, np.int32)
  num_classes = jax.eval_shape(clf, x).logits.shape[1]
  keys = jax.random.split(jax.random.key(0), 1)
  interpreter = interpreters.build('mask' if step in SOLVED else step)
  maps = jax.eval_shape(interpreter.explain, clf, x, y, keys)
  batch = make_batch(n, size, num_classes, maps.shape[1])
  ours, figures = compile_steps(clf, step, batch, looks or 1)
  sides: dict[str, Callable[[], Any]] = {'jax': ours}
  row: dict[str, Any] = {'step': step, 'batch_size': n, 'looks': looks, **figures}
  if looks is not None:
    return row
  if rival is not None:
    theirs = rival(step, *map(np.asarray, batch[1:4]), WEIGHT, EPSILON, ALPHA)
    sides['torch'] = lambda: theirs(CHUNK)
    a, b = first_gradient(clf, step, batch), theirs(1)
    row['gradient_difference'] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
  seconds = take_turns(sides, repeats)
  for name, s in seconds.items():
    row |= {f'seconds_{name}': float(np.median(s)), f'seconds_{name}_min': float(s.min())}
  if rival is not None:
    row['ratio'] = float(np.median(seconds['torch'] / seconds['jax']))
  passes = make_attack(clf, step).passes(1)
  flops = passes * forward_flops(clf, batch.x)
  row['flops'] = flops
  row['ceiling_share'] = flops / row['seconds_jax_min'] / ceiling if ceiling else None
  return row


COLUMNS = {
  'step': ('step', 's'),
  'batch_size': ('batch', 'd'),
  'looks': ('looks', 'd'),
  'seconds_jax': ('s per evaluation', '.4f'),
  'seconds_torch': ('torch', '.4f'),
  'ratio': ('torch / jax', '.2f'),
  'gradient_difference': ('gradients differ by', '.1e'),
  'ceiling_share': ('of matmul ceiling', '.0%'),
  'seconds_compile': ('s to compile', '.1f'),
  'gib': ('GiB', '.2f'),
}


def table(rows: list[dict[str, Any]], header: bool = True) -> str:
  """The rows as markdown."""
  lines = []
  if header:
    lines = [
      '| ' + ' | '.join(title for title, _ in COLUMNS.values()) + ' |',
      '|' + ' --- |' * len(COLUMNS),
    ]
  for row in rows:
    cells = [
      '–' if row.get(name) is None else format(row[name], spec)
      for name, (_, spec) in COLUMNS.items()
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def _positive(config: Mapping[str, Any], name: str) -> list[int]:
  values = config[name]
  sizes = [whole_number(v) or 0 for v in values]
  if not sizes or min(sizes) < 1:
    raise InputError(f'--{name} is {",".join(values)}; expected numbers such as 4,16')
  return sizes


def main(config: Mapping[str, Any]) -> None:
  """The whole command."""
  figures = bench(config)
  if out := config['out']:
    out = validate.user_path(out)
    with store.writing(out, 'choose another --out'):
      images.write_atomic(out, (json.dumps(figures, indent=1) + '\n').encode())
    print(out)


if __name__ == '__main__':
  _flags.define_bench_flags()
  _flags.start(main)
