"""The layout that BUILD.md describes: imports go downwards, and no command imports another."""

import ast
import pathlib

import pytest

TREE = pathlib.Path(__file__).parents[1]
# From the ground up; what stands on one floor does not import each other.
FLOORS = (
  ('types',),
  ('images', 'losses', 'validate'),
  ('nets', 'overlay'),
  ('classifier', 'data'),
  ('interpreters',),
  ('attacks', 'weights'),
  ('metrics',),
  ('training', 'workdir'),
  ('api',),
  ('',),  # the package itself
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(file):
  """Modules named by the file's imports, those inside functions too."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{name.name}' for name in node.names)


def room(module):
  """The floor's name of adv2_jax.<room>.…"""
  parts = module.split('.')
  return parts[1] if len(parts) > 1 and parts[1] in FLOOR else ''


@pytest.mark.parametrize('file', sorted((TREE / 'adv2_jax').rglob('*.py')), ids=lambda f: f.stem)
def test_library_imports_go_downwards(file):
  inside = file.relative_to(TREE).with_suffix('')
  own = room('.'.join(inside.parts)) if inside.name != '__init__' or len(inside.parts) > 2 else ''
  for module in imported(file):
    assert not module.startswith(('experiments', 'tests'))
    if module.startswith('adv2_jax') and (other := room(module)) != own:
      assert FLOOR[other] < FLOOR[own], f'{inside} imports {module}'


def test_no_command_imports_another():
  files = sorted((TREE / 'experiments').glob('[!_]*.py'))
  commands = {file.stem for file in files}
  assert {'attack', 'evaluate', 'explain', 'train'} <= commands
  for file in files:
    names = {module.split('.')[1] for module in imported(file) if module.startswith('experiments.')}
    assert not names & commands, file


def test_no_module_hides_a_public_function():
  import adv2_jax

  assert callable(adv2_jax.attack)
  assert not (TREE / 'adv2_jax/attack.py').exists()
