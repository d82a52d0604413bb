r"""MASK's published solver beside `masking.fast`: `python -m experiments.mask_curves`.

    python -m experiments.mask_curves --num_examples 64

The objective l_map, mean over the first N images that the classifier gets right and over `VIEWS`
jitters, against the iterations. Each starts and ends where its solver does; neither is told these
jitters. Writes curves.json and curves.png.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.figure import Figure

from adv2_jax import images
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters import masking
from adv2_jax.types import Array, Image, Key, Label, fold_keys
from adv2_jax.workdir import figures
from adv2_jax.workdir.store import check_workdir, default_workdir, directory, plain, writing
from experiments import _flags, _judge, _setup

VIEWS = 4
POINTS = 25
_BEYOND = 10**6  # jitters that no iteration draws
REMEDY = 'choose another --workdir'


@functools.partial(jax.jit, static_argnames='c')
def curve(clf: Classifier, x: Image, y: Label, keys: Key, c: masking.MaskConfig) -> Array:
  """l_map [POINTS+1,B] of the solver's mask, from its start to its end in equal steps."""

  def value(m: Array) -> Array:
    def one(i: Array) -> Array:
      view = masking.jittered(x, fold_keys(keys, _BEYOND + i), c.jitter)
      return masking.mask_objective(clf, m, view, y, c)

    return jax.lax.map(one, jnp.arange(VIEWS)).mean(0)

  def on(state: masking.MaskState, i: Array) -> tuple[masking.MaskState, Array]:
    start, end = (c.steps * (i + k) // POINTS for k in (0, 1))
    body = lambda j, s: masking.solver_step(clf, s, x, y, fold_keys(keys, j), c)  # noqa: E731
    state = jax.lax.fori_loop(start, end, body, state)
    return state, value(state.mask)

  state = masking.start(c, x)
  found = jax.lax.scan(on, state, jnp.arange(POINTS))[1]
  return jnp.concatenate([value(state.mask)[None], found])


def solvers(size: int) -> dict[str, masking.MaskConfig]:
  """The published solver, the fast one, and the usual one for that image size if it is neither."""
  usual, published = masking.usual(size), masking.MaskConfig()
  names = ('start', 'steps', 'learning_rate', 'decay', 'b1', 'b2')
  published = usual._replace(**{name: getattr(published, name) for name in names})
  found = {'published': published, 'fast': masking.fast(published)}
  return found if usual in found.values() else found | {'usual': usual}


def draw(rows: dict[str, dict[str, Any]]) -> Figure:
  """The curves; iterations on a logarithmic axis."""
  figure = Figure(figsize=(7, 4), dpi=140, layout='constrained')
  axis = figure.subplots()
  for name, row in rows.items():
    axis.plot(row['iterations'][1:], row['objective'][1:], label=f'{name}, {row["steps"]}')
    axis.axhline(row['objective'][-1], color='0.7', lw=0.6, zorder=0)
  axis.set(xlabel='iterations', ylabel='objective, mean over images')
  figures.log_axis(axis.xaxis)
  axis.legend(title='solver, iterations')
  return figure


def run(flags: dict[str, Any]) -> pathlib.Path:
  """The whole command, once the flags are known."""
  config = flags | {'target_label': 'random', 'target_map': 'benign', 'interpreters': ['mask']}
  _flags.check(config)
  path = directory(flags['workdir'] or default_workdir(flags))
  check_workdir(path, flags, resume=False, remedy=REMEDY)
  setup = _setup.load(config)
  examples = _setup.select(setup, attacked=False)
  chosen = solvers(_setup.image_size(config))
  values: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
  with tqdm.tqdm(total=len(examples.id) * len(chosen), unit='mask') as bar:
    for shard in _setup.shards(setup, examples, np.arange(len(examples.id))):
      for name, c in chosen.items():
        bar.set_postfix_str(name)
        found = curve(setup.clf, shard.batch.x, shard.label, shard.keys, c)
        values[name].append(np.asarray(found)[:, shard.is_real])
        bar.update(int(shard.is_real.sum()))
  rows = {}
  for name, parts in values.items():
    found, c = np.concatenate(parts, axis=1), chosen[name]
    rows[name] = {
      **c._asdict(),
      'n': found.shape[1],
      'iterations': [c.steps * i // POINTS for i in range(POINTS + 1)],
      'objective': found.mean(1).tolist(),
      'objective_median': float(np.median(found[-1])),
    }
  report = {'config': flags, 'environment': _judge.environment(config), 'solvers': rows}
  with figures.style():
    drawn = figures.png(draw(rows))
  with writing(path, REMEDY):
    images.write_atomic(path / 'curves.png', drawn)
    images.write_atomic(path / 'curves.json', json.dumps(plain(report), indent=1).encode())
  for name, row in rows.items():
    print(f'{name}: {row["steps"]} iterations, objective {row["objective"][-1]:.4f}')
  print(path)
  return path


if __name__ == '__main__':
  _flags.define_data_flags()
  _flags.define_example_flags()
  _flags.start(run)
