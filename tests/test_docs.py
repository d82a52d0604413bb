"""What users are told to type: each Python snippet runs, each command line is parsed."""

import ast
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags
from cli import FLAGS_OF

import adv2_jax as adv2
from experiments import _flags

GONE = ('mask_routes',)  # of an earlier commit, as BUILD says
TREE = pathlib.Path(__file__).parents[1]


def blocks(text, language):
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


@pytest.mark.parametrize('name', ['README.md', 'BUILD.md'])
def test_python_snippets_run_one_after_the_other(name):
  """With what a reader has: the usual imports, and what the snippets before it made."""
  found = blocks((TREE / name).read_text(encoding='utf-8'), 'python')
  assert found
  names = {'jax': jax, 'jnp': jnp, 'np': np, 'adv2': adv2}
  for code in found:
    exec(compile(code, name, 'exec'), names)


def command_lines():
  """Every `python -m experiments.…` and `make …` of the documents and the commands' own."""
  texts = {name: (TREE / name).read_text(encoding='utf-8') for name in ('README.md', 'BUILD.md')}
  for file in sorted((TREE / 'experiments').glob('[!_]*.py')):
    texts[file.name] = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
  for name, text in texts.items():
    text = re.sub(r'\\\s*\n\s*', ' ', text).replace('\\|', '|')
    inline = re.findall(r'`((?:python -m|make) [^`]*)`', re.sub(r'\s*\n\s*', ' ', text))
    lines = re.findall(r'^\s*((?:python -m|make) .*)$', text, re.MULTILINE)
    for line in [*inline, *lines]:
      for one in alternatives(line.strip()):
        yield pytest.param(one, id=f'{name}: {one[:60]}')


def alternatives(line):
  """{a|b} stands for two commands."""
  if not (choice := re.search(r'\{([^}]*\|[^}]*)\}', line)):
    return [line]
  parts = (
    line[: choice.start()] + part.strip() + line[choice.end() :] for part in choice[1].split('|')
  )
  return [one for part in parts for one in alternatives(part)]


class Defining:
  """Stands for absl.flags: defines into its own values, not this process's."""

  def __init__(self):
    self.values = absl_flags.FlagValues()

  def __getattr__(self, name):
    return lambda *given, **options: getattr(absl_flags, name)(
      *given, flag_values=self.values, **options
    )


@pytest.mark.parametrize('line', list(command_lines()))
def test_command_lines_are_parsed(line, monkeypatch):
  words = shlex.split(re.sub(r'(?<=\s)N(?=\s|$)', '5', line), comments=True)
  if words[0] == 'make':
    targets = re.findall(r'^(\w+):', (TREE / 'Makefile').read_text(), re.MULTILINE)
    assert words[1].rstrip(':') in targets
    return
  module, arguments = words[2], words[3:]
  if module == 'experiments.convert':
    assert len(arguments) == 2
    return
  folder, _, name = module.partition('.')
  if folder != 'experiments' or name in GONE:
    return
  assert name in FLAGS_OF, f'{module} is no command'
  defining = Defining()
  monkeypatch.setattr(_flags, 'flags', defining)
  for define in FLAGS_OF[name]:
    define()
  arguments = [a for a in arguments if a != '--help']
  if name in ('evaluate', 'transfer') and not arguments:
    arguments = ['--workdir=w']
  rest = defining.values([name, *arguments])
  assert rest == [name], 'further arguments'
  found = defining.values.flag_values_dict()
  if name in ('attack', 'explain'):
    chosen = found['interpreters'] or ['cam']
    chosen = ['cam', 'grad', 'joint'] if chosen == ['joint'] else chosen  # as `config` does
    found |= {'interpreters': chosen, 'epsilon': _flags.radii(found.get('epsilon'))}
    _flags.check(found)
