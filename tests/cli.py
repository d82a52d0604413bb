"""What tests of `experiments.attack` share: a tiny data set with its net, and ways to run it."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from conftest import XLA_FLAGS, flag_defaults
from parity.weights import numpy_weights

from adv2_jax import nets
from adv2_jax.images import from_uint8
from adv2_jax.weights import files as weight_files
from adv2_jax.weights import zoo
from experiments import _flags, _setup, attack

SIZE, EPSILON, SEED = 32, 0.05, 3
TREE = pathlib.Path(attack.__file__).parents[1]
WHOLE = {'interpreters': ['grad', 'cam']}

FLAGS_OF = {
  'attack': (_flags.define_data_flags, _flags.define_attack_flags),
  'explain': (_flags.define_data_flags, _flags.define_explain_flags),
  'mask_curves': (_flags.define_data_flags, _flags.define_example_flags),
  'evaluate': (_flags.define_evaluate_flags,),
  'transfer': (_flags.define_transfer_flags,),
  'tables': (_flags.define_tables_flags,),
  'train': (_flags.define_train_flags,),
  'bench': (_flags.define_bench_flags,),
}


@functools.cache
def defaults():
  """The command's flags."""
  return flag_defaults(_flags.define_data_flags, _flags.define_attack_flags)


def make_victim(folder):
  """Flags of a random net that gets 8 of 10 images right, spread over several classes."""
  rng = np.random.RandomState(0)
  waves = np.sin(np.arange(SIZE).reshape(-1, 1, 1) * rng.uniform(0.1, 2, (3, 1, 1, 3)))
  noise = rng.uniform(-1, 1, (10, SIZE, SIZE, 3))
  image = np.uint8(127 + 80 * waves[np.arange(10) % 3] + 40 * noise)  # three kinds
  module = nets.build('scene_resnet')
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
  tensors = numpy_weights(zoo.tensor_shapes(shapes), seed=1)
  for shift in (True, False):
    weight_files.write_safetensors(folder / 'net.safetensors', tensors)
    clf = zoo.load_classifier('scene_resnet', folder / 'net.safetensors')
    logits = np.asarray(clf(from_uint8(image)).logits)
    if shift:  # else all images are of one class
      tensors['fc.bias'] = tensors['fc.bias'] - logits.mean(0)
  label = logits.argmax(-1)
  assert len(set(label[2:7].tolist())) == 3
  label[:2] = (label[:2] + 1) % 10
  np.savez(folder / 'data.npz', image=image, label=label)
  mask = np.zeros((10, SIZE, SIZE), bool)
  mask[:, 8:20, 5:25] = True
  mask[3] = False  # has no object
  np.savez(folder / 'masks.npz', mask=mask)
  return {
    'dataset': 'npz',
    'data_path': str(folder / 'data.npz'),
    'masks': str(folder / 'masks.npz'),
    'image_size': SIZE,
    'weights': str(folder / 'net.safetensors'),
    'interpreters': ['cam'],
    'epsilon': EPSILON,
    'num_examples': 5,
    'batch_size': 2,
    'steps_s2': 4,
    'seed': SEED,
    'num_devices': 1,
  }


def run(victim, workdir, resume=False, **changes):
  """The command in this process; what it has compiled serves the next test too."""
  attack.run(defaults() | victim | changes | {'workdir': str(workdir), 'resume': resume})
  return pathlib.Path(workdir)


def select(victim, **changes):
  """What a run would work on."""
  return _setup.select(_setup.load(defaults() | victim | changes))


def command(flags, cwd):
  """The command as a user runs it, on one device."""
  arguments = [f'--{k}={",".join(v) if isinstance(v, list) else v}' for k, v in flags.items()]
  env = os.environ | {'PYTHONPATH': str(TREE), 'XLA_FLAGS': XLA_FLAGS}
  return subprocess.run(
    [sys.executable, '-m', 'experiments.attack', *arguments],
    cwd=cwd,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )


# One process imports what takes long and forks for each case; or does all cases itself, so that one
# command's programs serve the next.
COMMANDS = """
  import json, os, runpy, sys
  from adv2_jax.training import fit
  from adv2_jax.workdir import report
  from experiments import _flags, _setup

  cases, outputs, forks = json.loads(sys.argv[1])

  def run(k, name, flags):
    for file, descriptor in outputs:
      os.dup2(os.open(f'{k}.{file}', os.O_WRONLY | os.O_CREAT), descriptor)
    for defined in [*_flags.FLAGS.flags_by_module_dict().get('experiments._flags', ())]:
      delattr(_flags.FLAGS, defined.name)
    sys.argv, code = [name, *flags], 0
    try:
      runpy.run_module(f'experiments.{name}', run_name='__main__', alter_sys=True)
    except SystemExit as error:
      code = error.code or 0
    if isinstance(code, str):
      print(code, file=sys.stderr)
    sys.stdout.flush()
    return code if isinstance(code, int) else 1

  codes = []
  for k, (name, flags) in enumerate(cases):
    if not forks:
      codes.append(run(k, name, flags))
    elif child := os.fork():
      codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    else:
      os._exit(run(k, name, flags))  # the usual way out takes a second
  with open('codes', 'w') as file:
    json.dump(codes, file)
  os._exit(0)
"""


def commands(cases, folder, env=None, *, forks=True, closed=False):
  """[(exit code, stdout, stderr)] of commands [(name, flags)], one after the other.

  `forks`: each in a process of its own. `closed`: standard output is closed, as by `>&-`.
  """
  outputs = (('out', 1), ('err', 2))[closed:]
  closing = ['sh', '-c', 'exec "$@" >&-', 'sh'] if closed else []
  code, given = textwrap.dedent(COMMANDS), json.dumps([cases, outputs, forks])
  done = subprocess.run(
    [*closing, sys.executable, '-c', code, given],
    cwd=folder,
    env={'PYTHONPATH': str(TREE), 'JAX_PLATFORMS': 'cpu'} if env is None else env,
    stderr=subprocess.PIPE,
    check=False,
  )
  assert (folder / 'codes').exists(), done.stderr
  codes = json.loads((folder / 'codes').read_text())
  read = lambda k, file: (folder / f'{k}.{file}').read_text(errors='replace')  # noqa: E731
  return [(c, '' if closed else read(k, 'out'), read(k, 'err')) for k, c in enumerate(codes)]


def contents(workdir, *parts):
  """{path: bytes} of the files below these parts of a workdir."""
  found = [p for part in parts for p in [workdir / part, *(workdir / part).rglob('*')]]
  return {str(p.relative_to(workdir)): p.read_bytes() for p in found if p.is_file()}


def rows_of(workdir):
  """The rows of metrics.json, times aside."""
  rows = json.loads((workdir / 'metrics.json').read_text())['rows']
  return [{k: v for k, v in row.items() if not k.startswith('seconds')} for row in rows]
