"""Set before jax starts: eight virtual devices, rank promotion raises, warnings are errors.

Most of the suite's time is JAX's. So XLA does not optimise, all that it compiles is kept for the
other worker, for the commands that tests start and for the next run, programs do not carry
tracebacks, and garbage, of which traces make a lot, is collected rarely.
"""

import gc
import os
import pathlib

from jaxlib import version

# XLA does not promise to keep these names.
LIGHT = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
QUICK = f'--xla_backend_optimization_level=0 {LIGHT if version.__version_info__ < (0, 11) else ""}'
DEVICES = '--xla_force_host_platform_device_count=8'
# What is given comes last, and so counts: `make slow` gives another level. xdist's workers inherit
# all of it.
XLA_FLAGS = ' '.join(dict.fromkeys(f'{QUICK} {os.environ.get("XLA_FLAGS", "")}'.split()))
XLA_FLAGS = XLA_FLAGS.replace(DEVICES, '').strip()
os.environ['XLA_FLAGS'] = f'{XLA_FLAGS} {DEVICES}'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

gc.set_threshold(200_000, 50, 1000)

import jax
import pytest

from experiments import _process

if cache := _process.cache_directory():
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))  # for commands
  jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
jax.config.update('jax_numpy_rank_promotion', 'raise')

PARITY = pathlib.Path(__file__).parent / 'parity'
SHARED = pathlib.Path(__file__).parent.parent.parent / 'shared'


def shared_data(name: str) -> pathlib.Path:
  """A file of the shared real data, or skip with the reason."""
  path = SHARED / 'data' / name
  if not path.exists():
    pytest.skip(f'real data {name} is not on this machine')
  return path


class _Recorder:
  """Stands for absl.flags: keeps the defaults, defines nothing in this process."""

  def __init__(self):
    self.defaults = {}

  def __getattr__(self, name):
    return lambda flag, default, *_, **__: self.defaults.update({flag: default})


def flag_defaults(*define):
  """{flag: default} of these functions of `experiments._flags`."""
  from experiments import _flags

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_flags, 'flags', _Recorder())
    for function in define:
      function()
    return _flags.flags.defaults


@pytest.fixture(scope='session')
def victim(tmp_path_factory):
  """Flags of a tiny run of `experiments.attack`; see `cli.make_victim`."""
  import cli

  return cli.make_victim(tmp_path_factory.mktemp('victim'))


@pytest.fixture(scope='session')
def finished(victim, tmp_path_factory):
  """A whole run of two interpreters, not to be written to."""
  import cli

  return cli.run(victim, tmp_path_factory.mktemp('runs') / 'whole', **cli.WHOLE)


@pytest.fixture(scope='session')
def tensors():
  """Weights of a scene_resnet that float16 holds exactly."""
  from parity.weights import numpy_weights
  from weights_help import zoo_shapes

  made = numpy_weights(zoo_shapes('scene_resnet'), seed=3)
  return {name: t.astype('float16').astype('float32') for name, t in made.items()}


@pytest.fixture(scope='session')
def variables(tensors):
  """The same, as the module takes them."""
  from adv2_jax import nets
  from adv2_jax.weights import zoo

  return zoo.load_variables(nets.build('scene_resnet'), tensors)


@pytest.fixture
def builtin(tmp_path, monkeypatch):
  """An installed package's folder of built-in weights, empty."""
  from adv2_jax.weights import zoo

  monkeypatch.setattr(zoo, '_PACKAGE', tmp_path / 'adv2_jax')
  folder = tmp_path / 'adv2_jax' / '_builtin'
  folder.mkdir(parents=True)
  return folder


@pytest.fixture
def bars(monkeypatch):
  """The progress bars that a command shows."""
  import tqdm

  shown = []

  class Bar(tqdm.tqdm):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      shown.append(self)

  monkeypatch.setattr(tqdm, 'tqdm', Bar)
  return shown


@pytest.fixture
def key():
  return jax.random.key(0)
