"""All commands on tiny sizes, in the surroundings that users have."""

import json
import os

import cli
import pytest

PLAIN = {'ascii', 'closed output', 'no home', 'own matplotlib settings'}
SETTINGS = {
  'x64': {'JAX_ENABLE_X64': '1'},
  'ascii': {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C', 'PYTHONUTF8': '0'},
  'closed output': {},
  'no home': {'HOME': None, 'XDG_CACHE_HOME': None},
  'own matplotlib settings': {'MATPLOTLIBRC': 'rc'},
  '8 devices': {'XLA_FLAGS': f'{cli.XLA_FLAGS} --xla_force_host_platform_device_count=8'},
}
RC = 'font.size: 40\nfigure.dpi: 20\nsavefig.format: pdf\nsavefig.bbox: tight\ntext.usetex: True\n'


def flags(given):
  """As on a command line."""
  return [f'--{k}={",".join(v) if isinstance(v, list) else v}' for k, v in given.items()]


@pytest.fixture(scope='module')
def pictures():
  """{file: bytes} of the first run's images, maps and figures."""
  return {}


@pytest.mark.parametrize('name', SETTINGS)
def test_every_command_works(name, victim, tmp_path, pictures):
  (tmp_path / 'rc').write_text(RC)
  env = os.environ | {'PYTHONPATH': str(cli.TREE), 'XLA_FLAGS': cli.XLA_FLAGS} | SETTINGS[name]
  env = {k: v for k, v in env.items() if v is not None}
  attack = victim | {'num_examples': 3, 'steps_s2': 2, 'workdir': 'a'}
  if name == '8 devices':
    attack |= {'num_devices': 8, 'batch_size': 1}
  explain = {k: attack[k] for k in ('dataset', 'data_path', 'image_size', 'weights', 'batch_size')}
  train = {'dataset': 'npz', 'data_path': victim['data_path'], 'batch_size': 4, 'steps': 1}
  cases = [
    ('attack', flags(attack)),
    ('evaluate', ['--workdir=a']),
    ('transfer', ['--workdir=a']),
    ('explain', flags(explain | {'interpreters': 'cam', 'num_examples': 3, 'workdir': 'e'})),
    ('train', flags(train | {'workdir': 't'})),
  ]
  ran = cli.commands(cases, tmp_path, env, forks=False, closed=name == 'closed output')
  for (command, _), (code, out, err) in zip(cases, ran, strict=True):
    assert code == 0, (command, err)
    assert 'Traceback' not in err
    assert bool(out) == (name != 'closed output'), command
  code, out, err = ran[0]
  if out:
    *table, last = out.strip().splitlines()
    assert last == 'a/report.html'
    assert any('| cam | adv2 | 3 |' in line for line in table)
  for shown in ('benign cam, making the maps', 'adv2 cam step 2/2, success', 'adv2 cam judged, '):
    assert shown in err
  config = json.loads((tmp_path / 'a/metrics.json').read_text())['config']
  assert config == cli.defaults() | attack | {'compilation_cache': None, 'target_label': 'random'}
  assert (tmp_path / 'e/explain.json').exists()
  assert (tmp_path / 't/scene_resnet.safetensors').exists()
  if name in PLAIN:
    found = cli.contents(tmp_path, 'a/examples', 'a/maps', 'a/figures', 'a/examples.csv')
    found |= cli.contents(
      tmp_path, 'e/figures', 'a/transfer/transfer.md', 'a/transfer/transfer.png'
    )
    assert sum(file.endswith('.png') for file in found) > 10
    assert found == (pictures or found)
    pictures.update(found)
