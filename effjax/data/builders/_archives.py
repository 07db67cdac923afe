"""Reads a Debian package without Debian's tools.

A .deb is a Unix `ar` archive: the line `!<arch>`, then for each member a header of 60
bytes (name in the first 16, size in decimal at 48 to 58) and the content, padded to an
even length.
"""

import pathlib

from effjax.core import errors

_MAGIC = b"!<arch>\n"
_HEADER_BYTES = 60


def ar_member(path: pathlib.Path, prefix: str) -> bytes:
  """The content of the first member of an `ar` archive whose name starts so.

  Raises:
    InputError: not such an archive, or no such member.
  """
  with open(path, "rb") as file:
    if file.read(len(_MAGIC)) != _MAGIC:
      raise errors.InputError(f"{path} is not a Debian package")
    while header := file.read(_HEADER_BYTES):
      name, size = header[:16].decode().strip(), int(header[48:58])
      if name.startswith(prefix):
        return file.read(size)
      file.seek(size + size % 2, 1)
  raise errors.InputError(f"{path} has no member {prefix}")
