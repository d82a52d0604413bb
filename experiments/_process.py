"""What every command does to its own process: safe output, JAX's cache of compiled programs."""

import hashlib
import os
import pathlib
import platform
import sys
import warnings
from typing import Any, TextIO

import jax

from adv2_jax.validate import user_path

CACHE_VARIABLE = 'ADV2_JAX_CACHE'


def cache_directory(flag: str | None = None) -> pathlib.Path | None:
  """Where compiled programs are kept: the flag, ADV2_JAX_CACHE, else the user's cache directory.

  None where flag or variable are empty. A folder for each kind of processor, as programs for one do
  not run on all, and home directories are shared.
  """
  chosen = os.environ.get(CACHE_VARIABLE) if flag is None else flag
  if chosen == '':
    return None
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  path = user_path(chosen or pathlib.Path(base) / 'adv2_jax')
  return None if path.parts[0] == '~' else path / processor()  # nobody's home


def processor() -> str:
  """A name for this kind of processor."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  abilities = next((v for v in lines if v.startswith(('flags', 'Features'))), lines[0])
  return f'{platform.machine()}-{hashlib.sha256(abilities.encode()).hexdigest()[:8]}'


def keep_compiled(flag: str | None = None) -> None:
  """Switches JAX's persistent cache on; not where it cannot be written, or JAX has one already."""
  path = cache_directory(flag)
  if flag == '':
    jax.config.update('jax_enable_compilation_cache', False)
  if path is None or (flag is None and getattr(jax.config, 'jax_compilation_cache_dir', None)):
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError:  # no home, or none that can be written: slower, not worse
    return
  if os.access(path, os.W_OK):
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    # Cut short, by a kill or because another process is at it just now: JAX compiles by itself.
    warnings.filterwarnings('ignore', 'Error reading persistent compilation cache', UserWarning)


class Output:
  """A stream that a run outlives: what nobody reads, or cannot be encoded, is no error."""

  def __init__(self, stream: TextIO | None):
    self._stream = open(os.devnull, 'w') if stream is None else stream  # noqa: SIM115
    if hasattr(self._stream, 'reconfigure'):
      self._stream.reconfigure(errors='replace')

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """As the stream's, but quiet once the reader has gone."""
    try:
      return self._stream.write(text)
    except BrokenPipeError:
      return self._drop()

  def flush(self) -> None:
    """Likewise."""
    try:
      self._stream.flush()
    except BrokenPipeError:
      self._drop()

  def _drop(self) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
    return 0


def guard_output() -> None:
  """Puts such streams in the place of standard output and error."""
  sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
