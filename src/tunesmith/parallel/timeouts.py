"""How long ranks wait for one another, whichever group they do it in."""

from __future__ import annotations

from datetime import timedelta

# Of torch's own 10 minutes (NCCL) or 30 (gloo), a rank that reads a large model from a slow disk takes more. Whoever
# makes a process group hands this on: torch gives new ones its own again.
GROUP_TIMEOUT = timedelta(hours=1)
