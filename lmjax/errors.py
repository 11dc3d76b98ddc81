"""What ends a command, and the exit code by which a script or a sweep knows what to do next.

0    done
1    a mistake of ours, with a traceback
2    the user's mistake, in one sentence
70   stopped by the numbers: not finite, or a spike
74   storage: a disk is full, gone or lies
75   nothing is wrong with the command: start it again
130  interrupted before there was anything to save
"""


class UserError(ValueError):
  """The user's mistake, said in one sentence."""

  exit_code = 2


class NonFinite(FloatingPointError):
  """The loss or the gradient is no longer a number."""

  exit_code = 70


class StorageError(RuntimeError):
  """What should have been written is not there, or what is there is not what was written."""

  exit_code = 74


class Restart(RuntimeError):
  """The run has stopped for a reason of its surroundings, and goes on when it is started again."""

  exit_code = 75


class ProcessLost(Restart):
  """A process did not come or is gone."""


def of_code(code: int) -> type[Exception]:
  """What ends a command with this code; a mistake of ours is a RuntimeError."""
  known = UserError, NonFinite, StorageError, Restart
  return next((one for one in known if one.exit_code == code), RuntimeError)
