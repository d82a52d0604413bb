"""What the commands that judge images share.

The jitted judges, the table, what ran it, and what a finished run left, in batches.
"""

import contextlib
import math
import pathlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax import images, losses, metrics
from adv2_jax.attacks import frameworks
from adv2_jax.types import Array, InputError, Map
from adv2_jax.workdir import store
from adv2_jax.workdir.results import Results
from experiments import _printed, _setup

NOT_KEPT = ('again', 'other')  # no image or map of these is written
score = jax.jit(metrics.score)
_smoothness = jax.jit(images.flow_smoothness)
two_class_maps = jax.jit(metrics.two_class_maps)
predictions = jax.jit(lambda clf, x: clf(x).logits.argmax(-1))
runners_up = jax.jit(lambda clf, x, y: losses.runner_up(clf(x).logits, y))


def bounds(config: Mapping[str, Any]) -> dict[str, float]:
  """How far the images of a run may be from the clean ones, for `metrics.score`."""
  if not frameworks.has_radius(config.get('framework', 'pgd')):
    return {'epsilon': math.inf, 'l2_radius': math.inf}
  if config.get('norm') == 'l2':
    return {'epsilon': math.inf, 'l2_radius': config['epsilon']}
  return {'epsilon': config['epsilon'], 'l2_radius': math.inf}


def flow_figures(flow: Any) -> dict[str, np.ndarray]:
  """Of flows f32[B,H,W,2]: roughness, and the largest displacement in pixels."""
  smoothness, flow = _smoothness(flow), np.asarray(flow)
  largest = np.sqrt(np.square(flow).sum(-1)).max((1, 2))
  return {'flow_smoothness': np.asarray(smoothness), 'flow_max': largest}


def patch_of(config: Mapping[str, Any], target_map: Map) -> Array | None:
  """The cells of the random patch aimed at, bool[B,h,w]; None where another map is."""
  return target_map > 0.5 if config.get('target_map') == 'random_patch' else None


def commit_of(folder: pathlib.Path) -> str | None:
  """The commit checked out in `folder`; None unless it is a repository, not just inside of one."""
  command = ['git', 'rev-parse', '--show-toplevel', '--short', 'HEAD']
  found = []
  with contextlib.suppress(OSError):  # no git on this machine
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = done.stdout.splitlines()
  own = len(found) == 2 and pathlib.Path(found[0]).resolve() == folder.resolve()
  return found[1] if own else None


def environment(config: dict[str, Any]) -> dict[str, Any]:
  """What ran the attack."""
  devices = _setup.devices_of(config)
  return {
    'jax': jax.__version__,
    'devices': f'{len(devices)} × {devices[0].device_kind}',
    'commit': commit_of(pathlib.Path(__file__).parents[1]),
  }


TABLE = {
  'epsilon': 'ε',
  'asr': 'ASR',
  'mc': 'MC',
  'map_l1': 'map L1',
  'map_iou': 'IoU',
  'map_spearman': 'Spearman',
  'patch_iou': 'patch IoU',
  'l2_mean': 'L2',
  'flow_max': 'px',
  'out_of_set': 'outside',
  'gradient_evaluations': 'evals',
  'seconds': 'seconds',
}


def table(found: list[dict[str, Any]]) -> str:
  """The rows as a markdown table; empty ones are left out."""
  found = [row for row in found if row['n']]
  radii = {row.get('epsilon') for row in found}
  left_out = {'epsilon'} if len(radii) < 2 else set()
  left_out |= {f for f in ('patch_iou', 'flow_max') if all(r.get(f) is None for r in found)}
  left_out |= set() if any(r.get('framework') == 'cw' for r in found) else {'l2_mean'}
  fields = [f for f in TABLE if f not in left_out]
  form = {'epsilon': '.4g'}
  lines = [
    [
      *(str(row[field]) for field in ('interpreter', 'attack', 'n')),
      *(_printed.cell(row.get(field), form.get(field, '.3f')) for field in fields),
    ]
    for row in found
  ]
  return _printed.table(['interpreter', 'attack', 'n', *(TABLE[f] for f in fields)], lines)


# What a finished run left.


class Disagreement(InputError):
  """Files of a run that do not say the same; the message names the first place."""


def batches(ids: Sequence[int], size: int) -> Iterator[list[int]]:
  """The ids, `size` at a time."""
  yield from (list(ids[k : k + size]) for k in range(0, len(ids), size))


def read_images(results: Results, attack: str, name: str, ids: Sequence[int]) -> Array:
  """The 8-bit images of a run as f32[B,H,W,3], or Disagreement."""
  files = [f'{store.image_folder(attack, name)}/{i:06d}.png' for i in ids]
  found = _stack([results.image(attack, name, i) for i in ids], files)
  return jnp.asarray(images.from_uint8(found))


def read_maps(results: Results, attack: str, name: str, ids: Sequence[int]) -> Array:
  """The maps of a run, f32[B,h,w], or Disagreement."""
  files = [f'{store.map_folder(attack, name)}/{i:06d}.npy' for i in ids]
  return jnp.asarray(_stack([results.map(attack, name, i) for i in ids], files))


def read_arrays(path: pathlib.Path, folder: str, ids: Sequence[int]) -> np.ndarray:
  """The arrays <folder>/<id>.npy of a run, or Disagreement."""
  files = [f'{folder}/{i:06d}.npy' for i in ids]
  there = [path / f for f in files]
  return _stack([np.load(f, allow_pickle=False) if f.exists() else None for f in there], files)


def _stack(arrays: Sequence[np.ndarray | None], files: Sequence[str]) -> np.ndarray:
  found: list[np.ndarray] = []
  for array, file in zip(arrays, files, strict=True):
    if array is None:
      raise Disagreement(f'{file} is missing, but examples.csv has this example')
    if array.shape != (found or [array])[0].shape:
      raise Disagreement(f'{file} has shape {array.shape}, but {files[0]} {found[0].shape}')
    found.append(array)
  return np.stack(found)


def read_masks(results: Results, ids: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
  """The objects; empty where there are none, which leaves the localisation fields empty."""
  files = [results.path / 'masks' / f'{i:06d}.png' for i in ids]
  return np.stack(
    [images.read_image(f)[..., 0] > 0 if f.exists() else np.zeros(shape, bool) for f in files]
  )
