"""The roll call: every process calls process 0 and says who it is; all hear who is missing.

It is held at the address where JAX's own service will be, before that is there.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.errors import ProcessLost, UserError

ARRIVAL = 30  # seconds in which all processes must have come


class End(NamedTuple):
  """An end of a connection, and the file that reads its lines."""

  socket: socket.socket
  lines: Any

  @classmethod
  def of(cls, connection: socket.socket, timeout: float) -> 'End':
    connection.settimeout(timeout)
    # Without a sign of life, routers forget a connection after ten minutes.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, 'TCP_KEEPIDLE'):
      connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    return cls(connection, connection.makefile('rb'))

  def send(self, message: Any) -> None:
    self.socket.sendall(json.dumps(message).encode() + b'\n')

  def receive(self) -> dict[str, Any] | None:
    """The next message; None where there comes none, or none of ours."""
    try:
      message = json.loads(self.lines.readline(1 << 24))
    except (OSError, ValueError):
      return None
    return message if isinstance(message, dict) else None

  def close(self) -> None:
    self.lines.close()
    self.socket.close()


def hold(
  coordinator: str, hello: Mapping[str, Any], seconds: float
) -> tuple[list[str], dict[int, End]]:
  """Process 0 waits for the others: (the host of each process, the connections with them).

  hello: 'process', 'processes', 'host', and 'about', in which all must agree.

  Raises:
    ProcessLost: some did not come in time.
    UserError: they do not fit together.  What is raised here is raised at those that came as well.
  """
  count, came, ends, wrong = hello['processes'], {0: hello}, {}, None
  deadline = time.monotonic() + seconds
  with (
    _server(coordinator) as server,
    _Callers(server) as callers,
    contextlib.ExitStack() as stack,
  ):
    while not wrong and len(_present(came, ends)) < count:
      end = callers.next(deadline)
      if not end:
        break
      said = end.receive()
      if not said or not said.keys() >= hello.keys():
        end.close()  # someone who knocks at every port
        continue
      stack.callback(end.close)
      process = said['process']
      if said['processes'] != count or process in _present(came, ends):
        wrong, ends[-1] = _misfit(came, said), end
      else:
        came[process], ends[process] = said, end
    hosts = [came.get(i, hello)['host'] for i in range(count)]
    if not wrong:
      found = difference([came.get(i, hello)['about'] for i in range(count)], hosts)
      wrong = [2, found] if found else _missing(came, count, coordinator, seconds)
    for end in ends.values():
      with contextlib.suppress(OSError):  # one that has gone meanwhile
        end.send({'hosts': hosts, 'wrong': wrong})
      end.socket.settimeout(None)
    _raise(wrong)
    stack.pop_all()
  return hosts, ends


def answer(
  coordinator: str, hello: Mapping[str, Any], seconds: float
) -> tuple[list[str], dict[int, End]]:
  """Another process calls process 0; returns and raises what `hold` does."""
  host, _, port = coordinator.rpartition(':')
  deadline, why = time.monotonic() + seconds, 'nobody listens'
  while True:
    try:
      left = max(1.0, deadline - time.monotonic())
      connection = socket.create_connection((host.strip('[]'), int(port)), timeout=left)
      # Where nobody listens at a port of this machine, a call may get that very port, and itself.
      if connection.getsockname() != connection.getpeername():
        break
      connection.close()
    except OSError as e:
      why = e.strerror or e
    if time.monotonic() > deadline:
      raise ProcessLost(f'process 0 did not come to {coordinator} within {seconds:g} s: {why}')
    time.sleep(0.1)
  end = End.of(connection, timeout=seconds + 10)  # process 0 came last of all, or waits no longer
  with contextlib.ExitStack() as stack:
    stack.callback(end.close)
    end.send(hello)
    heard = end.receive()
    if not heard or 'hosts' not in heard:
      raise ProcessLost(f'process 0 at {coordinator} does not answer, or is another program')
    _raise(heard['wrong'])
    connection.settimeout(None)
    stack.pop_all()
  return heard['hosts'], {0: end}


def _server(coordinator: str) -> socket.socket:
  port = int(coordinator.rpartition(':')[2])
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    return socket.create_server(('', port), family=family, dualstack_ipv6=both, backlog=1024)
  except OSError as e:
    raise UserError(f'process 0 cannot listen at port {port} ({e.strerror}): name another') from e


class _Callers:
  """Those who call, in the order in which they say something: who is silent holds nobody up."""

  def __init__(self, server: socket.socket):
    self._server, self._silent, self._poll = server, {}, select.poll()
    self._poll.register(server, select.POLLIN)

  def __enter__(self) -> '_Callers':
    return self

  def __exit__(self, *_: object) -> None:
    for end in self._silent.values():
      end.close()

  def next(self, deadline: float) -> End | None:
    """None when nobody says anything before the deadline."""
    while ready := self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
      for file, _ in ready:
        if file in self._silent:
          self._poll.unregister(file)
          return self._silent.pop(file)
        end = End.of(self._server.accept()[0], timeout=5)
        self._silent[end.socket.fileno()] = end
        self._poll.register(end.socket, select.POLLIN)
    return None


def _raise(wrong: Sequence | None) -> None:
  if wrong:
    raise {2: UserError, 75: ProcessLost}[wrong[0]](wrong[1])


def _present(came: dict[int, Mapping], ends: dict[int, End]) -> dict[int, Mapping]:
  """`came` without those who have hung up, perhaps to be started again."""
  poll = select.poll()
  for end in ends.values():
    poll.register(end.socket, select.POLLIN)  # they say nothing more, so this is their end
  over = {file for file, _ in poll.poll(0)}
  for process in [i for i, end in ends.items() if end.socket.fileno() in over]:
    del came[process]
    ends.pop(process).close()
  return came


def _misfit(came: Mapping[int, Mapping], said: Mapping[str, Any]) -> Sequence:
  process, count = said['process'], came[0]['processes']
  if said['processes'] != count:
    return [
      2,
      f'{_name(said)} was started as one of {said["processes"]}, {_name(came[0])} of {count}',
    ]
  return [
    2,
    f'two were started as process {process}: on {came[process]["host"]} and {said["host"]}',
  ]


def _missing(
  came: Mapping[int, Mapping], count: int, coordinator: str, seconds: float
) -> Sequence | None:
  missing = [str(i) for i in range(count) if i not in came]
  if not missing:
    return None
  who = f'process{"es" if len(missing) > 1 else ""} {", ".join(missing)} of {count}'
  there = ', '.join(_name(came[i]) for i in sorted(came)[:8])
  more = f' and {len(came) - 8} more' if len(came) > 8 else ''
  return [75, f'{who} did not come to {coordinator} within {seconds:g} s; there came {there}{more}']


def _name(said: Mapping[str, Any]) -> str:
  return f'process {said["process"]} ({said["host"]})'


def difference(found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
  """What the first process that differs from process 0 has otherwise; '' if none does."""
  for process, values in enumerate(found):
    keys = sorted(found[0].keys() | values.keys())
    other = [key for key in keys if values.get(key) != found[0].get(key)]
    if other:
      first = [f'{k} is {values.get(k)!r}, not {found[0].get(k)!r}' for k in other[:3]]
      more = [f'and {len(other) - 3} more'] if other[3:] else []
      who = f'process {process} ({hosts[process]}) differs from process 0 ({hosts[0]})'
      return f'{who}: {"; ".join(first + more)}'
  return ''
