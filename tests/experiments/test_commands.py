"""What all commands share: --help, and wrong flags whose message is the last line on stderr."""

import cli
import pytest
from cli import FLAGS_OF
from conftest import flag_defaults

from experiments import _flags

WRONG = [
  *((name, ('--colour=red',), "'colour'") for name in FLAGS_OF),
  ('attack', ('extra',), "unexpected argument 'extra'"),
  ('evaluate', ('--workdir=w', 'extra'), "unexpected argument 'extra'"),
  ('attack', ('--preset=quick',), '--preset=quick'),
  ('evaluate', (), '--workdir'),
  ('evaluate', ('--workdir=w',), 'w does not exist'),
  ('transfer', (), '--workdir'),
  ('transfer', ('--workdir=w',), 'w does not exist'),
  ('train', ('--batch_size=0',), '--batch_size=0'),
  ('train', ('--mean=0.5',), '--mean is 0.5; expected three numbers from 0 to 1'),
  ('bench', ('--dtype=int8',), '--dtype=int8'),
  ('bench', ('--repeats=0',), '--repeats is 0'),
]
CASES = [*((name, ('--help',)) for name in FLAGS_OF), *((name, flags) for name, flags, _ in WRONG)]


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """(command, flags) -> exit code, stdout, stderr."""
  return dict(zip(CASES, cli.commands(CASES, tmp_path_factory.mktemp('commands')), strict=True))


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
    ({'target_map': 'random_patch'}, ['grad', 'cam', 'mask', 'rts']),
    ({'target_map': 'away'}, ['grad', 'cam', 'rts']),
    ({'target_map': 'random_patch', 'preset': 'authors'}, ['grad', 'cam', 'mask', 'rts']),
  ],
)
def test_default_interpreters(change, expected):
  """The four of the method, as far as they can be attacked."""
  flags = flag_defaults(_flags.define_data_flags, _flags.define_attack_flags)
  assert flags['interpreters'] is None
  assert _flags.default_interpreters(flags | change) == expected
