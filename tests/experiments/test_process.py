"""What commands do to their process: output that nobody reads, Ctrl-C, the cache of programs."""

import io
import os
import subprocess
import sys
import textwrap

import cli
import jax
import pytest

from experiments import _process

# As a command, but for its work.
INTERRUPTED = """
  import sys
  from experiments import _flags

  def main(config):
    for _ in range(1000):
      print('✓' * 200)
    raise KeyboardInterrupt

  _flags.define_data_flags()
  _flags.define_attack_flags()
  sys.argv = ['attack', '--workdir=w', '--compilation_cache=']
  _flags.start(main)
"""


def test_an_interrupted_command_says_how_to_go_on_though_nobody_reads_its_output(tmp_path):
  read, write = os.pipe()
  os.close(read)
  env = os.environ | {'PYTHONPATH': str(cli.TREE), 'PYTHONIOENCODING': 'ascii'}
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(INTERRUPTED)],
    cwd=tmp_path,
    env=env,
    stdout=write,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  os.close(write)
  assert done.returncode == 130
  assert done.stderr == '\ninterrupted; go on with --resume --workdir=w\n'


def test_what_cannot_be_encoded_is_replaced():
  stream = io.TextIOWrapper(io.BytesIO(), 'ascii')
  out = _process.Output(stream)
  print('50 % ✓', file=out)
  out.flush()
  assert stream.buffer.getvalue() == b'50 % ?\n'
  closed = _process.Output(None)  # what Python makes of `>&-`
  print('nowhere', file=closed)
  closed.close()


@pytest.mark.parametrize(
  ('flag', 'variable', 'expected'),
  [
    (None, None, '/home/me/.cache/adv2_jax'),
    (None, '~/v', '/home/me/v'),
    ('/f', '~/v', '/f'),
    (None, '', None),
    ('', '~/v', None),
  ],
)
def test_where_programs_are_kept(monkeypatch, flag, variable, expected):
  monkeypatch.setenv('HOME', '/home/me')
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.delenv('ADV2_JAX_CACHE', raising=False)
  if variable is not None:
    monkeypatch.setenv('ADV2_JAX_CACHE', variable)
  found = _process.cache_directory(flag)
  assert (found and str(found.parent)) == expected
  assert found is None or found.name == _process.processor()


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  said = []
  monkeypatch.setattr(jax.config, 'update', lambda *v: said.append(v))
  _process.keep_compiled(str(tmp_path / 'file' / 'below'))
  assert not said
  _process.keep_compiled('')  # also one that JAX has by its own variable
  assert said == [('jax_enable_compilation_cache', False)]


DAMAGED = """
  import pathlib, warnings
  import jax
  from experiments import _process

  warnings.simplefilter('error')
  _process.keep_compiled('cache')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  double = jax.jit(lambda x: 2 * x)
  assert double(3.0) == 6
  files = list(pathlib.Path('cache').glob('*/*-cache'))
  assert files
  for file in files:
    file.write_bytes(file.read_bytes()[:40])
  jax.clear_caches()
  assert double(3.0) == 6
"""


def test_a_program_that_was_cut_short_is_compiled_anew_without_a_word(tmp_path):
  env = os.environ | {'PYTHONPATH': str(cli.TREE)}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(DAMAGED)],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stderr) == (0, '')
