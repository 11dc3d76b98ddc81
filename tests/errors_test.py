"""Every end of a command has its exit code, and the README's table is the one that holds."""

import pathlib
import re

import pytest

from lmjax import command, errors

ENDS = [
  (RuntimeError('x'), 1),
  (errors.UserError('x'), 2),
  (errors.NonFinite('x'), 70),
  (errors.StorageError('x'), 74),
  (OSError(28, 'No space left on device'), 74),
  (OSError(30, 'Read-only file system'), 74),
  (FileNotFoundError(2, 'No such file or directory'), 1),
  (errors.Restart('x'), 75),
  (errors.ProcessLost('x'), 75),
]


@pytest.mark.parametrize(('error', 'code'), ENDS, ids=lambda x: repr(x))
def test_exit_codes(error, code, capsys):
  def main():
    raise error

  with pytest.raises(SystemExit) as e:
    command.run(main, ['lmjax'])
  assert e.value.code == code
  said = capsys.readouterr().err
  assert ('Traceback' in said) == (code == 1)
  assert said.strip().startswith(('lmjax: ', 'Traceback'))


def test_what_ends_well_is_0():
  assert command.run(lambda: None, ['lmjax']) is None


def test_the_tables_are_one():
  readme = re.findall(r'^\| (\d+) \| ', pathlib.Path('README.md').read_text(), re.M)
  docstring = re.findall(r'^(\d+) ', errors.__doc__, re.M)
  by_signal = {code for code, _ in command._ENDS.values()}
  codes = {0, *(code for _, code in ENDS), *by_signal}
  assert readme == docstring == [str(code) for code in sorted(codes)]
  named = {c.exit_code for c in vars(errors).values() if hasattr(c, 'exit_code')}
  assert named <= {code for _, code in ENDS}
