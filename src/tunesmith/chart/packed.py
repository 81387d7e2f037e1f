"""What the zip of the package holds as `tunesmith/__init__.py`: it unpacks the sources beside it, and is them from then on.

A zip compresses each file by itself; together, as xz, they take half of that, and Helm's record holds them twice.
"""

import hashlib
import lzma
import os
import tempfile
import zipimport


def _unpack() -> str:
    """Return a zip of the sources in a folder of this user's own, written once."""
    packed = __loader__.get_data(os.path.join(os.path.dirname(__file__), "sources.xz"))  # type: ignore[name-defined]
    folder = os.path.join(tempfile.gettempdir(), f"tunesmith-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():  # somebody else's, who could write into it
        folder = tempfile.mkdtemp()
    path = os.path.join(folder, f"{hashlib.sha256(packed).hexdigest()[:16]}.zip")
    if not os.path.exists(path):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(lzma.decompress(packed))
        os.replace(file.name, path)
    return path


if __name__ == "tunesmith":
    _sources = zipimport.zipimporter(_unpack())
    __path__ = [os.path.join(_sources.archive, "tunesmith")]
    __file__ = os.path.join(__path__[0], "__init__.py")
    exec(compile(_sources.get_data(__file__), __file__, "exec"))
