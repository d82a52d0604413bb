"""What all commands share: --help, and wrong flags whose message is the last line on stderr."""

import pathlib
import subprocess
import sys
import textwrap

import pytest
from conftest import flag_defaults

from experiments import _flags

FLAGS_OF = {
  'attack': (_flags.define_data_flags, _flags.define_attack_flags),
  'explain': (_flags.define_data_flags, _flags.define_explain_flags),
  'mask_curves': (_flags.define_data_flags, _flags.define_example_flags),
  'evaluate': (_flags.define_evaluate_flags,),
  'train': (_flags.define_train_flags,),
  'bench': (_flags.define_bench_flags,),
}
WRONG = [
  *((name, ('--colour=red',), "'colour'") for name in FLAGS_OF),
  ('attack', ('extra',), "unexpected argument 'extra'"),
  ('evaluate', ('--workdir=w', 'extra'), "unexpected argument 'extra'"),
  ('attack', ('--preset=quick',), '--preset=quick'),
  ('evaluate', (), '--workdir'),
  ('evaluate', ('--workdir=w',), 'w does not exist'),
  ('train', ('--batch_size=0',), '--batch_size=0'),
  ('train', ('--mean=0.5',), '--mean is 0.5; expected three finite numbers'),
  ('bench', ('--dtype=int8',), '--dtype=int8'),
  ('bench', ('--repeats=0',), '--repeats is 0'),
]
CASES = [*((name, ('--help',)) for name in FLAGS_OF), *((name, flags) for name, flags, _ in WRONG)]

# One process imports what takes long and forks for each case.
RUN = """
  import os, runpy, sys
  from adv2_jax.training import fit as training
  from adv2_jax.workdir import report
  from experiments import _setup

  for k, (name, flags) in enumerate({cases!r}):
    child = os.fork()
    if child == 0:
      for file, descriptor in (('out', 1), ('err', 2)):
        os.dup2(os.open(f'{{k}}.{{file}}', os.O_WRONLY | os.O_CREAT), descriptor)
      sys.argv, code = [name, *flags], 0
      try:
        runpy.run_module(f'experiments.{{name}}', run_name='__main__', alter_sys=True)
      except SystemExit as error:
        code = error.code
      if isinstance(code, str):
        print(code, file=sys.stderr)
      sys.stdout.flush()
      os._exit(code if isinstance(code, int) else 1)  # the usual way out takes a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """(command, flags) -> exit code, stdout, stderr."""
  folder = tmp_path_factory.mktemp('commands')
  code = textwrap.dedent(RUN).format(cases=CASES)
  env = {'PYTHONPATH': str(pathlib.Path(_flags.__file__).parents[1]), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=folder, env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  texts = ([(folder / f'{k}.{file}').read_text() for file in ('out', 'err')] for k in range(99))
  codes = map(int, done.stdout.split())
  return {case: (code, *next(texts)) for case, code in zip(CASES, codes, strict=True)}


@pytest.mark.parametrize('name', FLAGS_OF)
def test_help_lists_every_flag_and_exits_with_0(ran, name):
  code, out, _ = ran[name, ('--help',)]
  assert code == 0
  for flag in flag_defaults(*FLAGS_OF[name]):
    assert f'{flag}:' in out or f'--[no]{flag}:' in out


@pytest.mark.parametrize(('name', 'flags', 'message'), WRONG)
def test_what_is_wrong_is_the_last_line_on_stderr(ran, name, flags, message):
  code, _, err = ran[name, flags]
  assert code == 1
  assert message in err.strip().splitlines()[-1]
  assert 'Traceback' not in err


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ({}, ['grad', 'cam', 'mask', 'rts']),
    ({'weights': 'scene_resnet'}, ['grad', 'cam', 'mask', 'rts']),
    ({'weights': 'other.npz'}, ['grad', 'cam', 'mask']),  # the decoder was not trained with these
    ({'weights': 'other.npz', 'decoder': 'rts.safetensors'}, ['grad', 'cam', 'mask', 'rts']),
    ({'model': 'resnet50'}, ['grad', 'cam', 'mask']),
    ({'target_map': 'random_patch'}, ['grad', 'cam', 'rts']),
    ({'target_map': 'random_patch', 'preset': 'authors'}, ['grad', 'cam', 'mask', 'rts']),
  ],
)
def test_default_interpreters(change, expected):
  """The four of the method, as far as they can be attacked."""
  flags = flag_defaults(_flags.define_data_flags, _flags.define_attack_flags)
  assert flags['interpreters'] is None
  assert _flags.default_interpreters(flags | change) == expected
