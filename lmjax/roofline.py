"""How long a program takes at the least, where each resource does all of its work without a pause.

Compute, the device's memory, the links between chips and the network between slices or hosts work
side by side, so that a step takes as long as the busiest of them (Williams et al., 2009).
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lmjax.hardware import Chip


def seconds(
  flops: float, moved: float, sent: Sequence[tuple[float, Sequence[int]]], mesh: Mesh, chip: Chip
) -> dict[str, float]:
  """Resource -> seconds that a device keeps it busy.

  Args:
    flops: of its matrix products.
    moved: bytes from and to its memory.
    sent: (bytes, the devices of one group, by their number in the mesh) of every collective.
    mesh: of the devices, in the order of the program.
    chip: what one of them can do.
  """
  busy = {'compute': flops / chip.flops, 'memory': moved / chip.bandwidth}
  busy |= {'links': 0.0, 'network': 0.0}
  devices = list(mesh.devices.flat)
  for size, group in sent:
    resource, rate = _way([devices[i] for i in group], devices, chip)
    busy[resource] += size / rate
  return busy


def axes(group: Sequence[int], mesh: Mesh) -> str:
  """The mesh axes along which a group lies, like 'data+model'."""
  places = np.unravel_index(np.asarray(group), mesh.devices.shape)
  varying = [axis for axis, at in zip(mesh.axis_names, places, strict=True) if len({*at}) > 1]
  return '+'.join(varying)


def _way(
  group: Sequence[jax.Device], everyone: Sequence[jax.Device], chip: Chip
) -> tuple[str, float]:
  """Between these devices: by which resource, and how many bytes a second each of them sends."""
  if len({_island(device, chip) for device in group}) > 1:
    return 'network', chip.network
  if chip.dims == 1:
    return 'links', chip.links
  share = 0.0
  for dim in range(chip.dims):
    at = {device.coords[dim] for device in group}
    size = 1 + max(device.coords[dim] for device in everyone)
    # A ring needs the links that come round; on a line, those at the ends have one way only.
    whole = len(at) == size and size % chip.ring == 0
    share += (1 if whole else 0.5) / chip.dims if len(at) > 1 else 0
  return 'links', chip.links * (share or 1)  # two devices of one chip: not known; no bottleneck


def _island(device: jax.Device, chip: Chip) -> int:
  """What the links hold together: a slice of TPUs, or a host of GPUs."""
  return device.process_index if chip.dims == 1 else getattr(device, 'slice_index', 0)
