"""What the commands that judge images share: the jitted judges, the table, what ran it."""

import contextlib
import pathlib
import subprocess
from typing import Any

import jax

from adv2_jax import metrics
from experiments import _setup

NOT_KEPT = ('again', 'other')  # no image or map of these is written
score = jax.jit(metrics.score)
two_class_maps = jax.jit(metrics.two_class_maps)


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
  'asr': 'ASR',
  'mc': 'MC',
  'map_l1': 'map L1',
  'map_iou': 'IoU',
  'map_spearman': 'Spearman',
  'out_of_set': 'outside',
  'gradient_evaluations': 'evals',
  'seconds': 'seconds',
}


def table(found: list[dict[str, Any]]) -> str:
  """The rows as a markdown table; empty ones are left out."""
  lines = ['| interpreter | attack | n | ' + ' | '.join(TABLE.values()) + ' |']
  lines.append('|---' * (len(TABLE) + 3) + '|')
  for row in (row for row in found if row['n']):
    values = [row.get(field) for field in TABLE]
    cells = ['–' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v) for v in values]
    lines.append(f'| {row["interpreter"]} | {row["attack"]} | {row["n"]} | {" | ".join(cells)} |')
  return '\n'.join(lines)
