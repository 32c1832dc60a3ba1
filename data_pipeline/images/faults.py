"""Samples that cannot be used: left out, counted once each, named, and too many of them stop the run."""

from __future__ import annotations

import logging
from threading import Lock

log = logging.getLogger("triptych.data_pipeline.images")

_LOGGED = 5
_NAMED = 20


class Faults:
    """The samples that this process left out, of one data set.

    len() is how many, `names` the first 20 of them with the reason. A sample met again in a later epoch
    counts once. The first 5 are logged as warnings. Threads may add together.
    """

    def __init__(self, limit: int) -> None:
        """limit: data.max_bad_samples."""
        self.limit = limit
        self.names: list[str] = []
        self._seen: set[str] = set()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, name: str, reason: str) -> None:
        """Counts a sample. Raises ValueError once there are more than `limit`."""
        with self._lock:
            if name not in self._seen:
                self._seen.add(name)
                if len(self.names) < _NAMED:
                    self.names.append(f"{name}: {reason}")
                if len(self) <= _LOGGED:
                    log.warning("left out %s: %s", name, reason)
                if len(self) == _LOGGED + 1:
                    log.warning("more samples are left out; they are counted but no longer logged")
            if len(self) > self.limit:
                raise ValueError(
                    f"{len(self)} samples could not be used, more than data.max_bad_samples={self.limit}; "
                    f"the first are: {'; '.join(self.names[:_LOGGED])}. Mend the shards or write them again, "
                    "or raise data.max_bad_samples"
                )


class CutImages:
    """The images of which this process left out boxes, as they have more than a row (data.max_boxes).

    len() is how many, each counted once; the first is logged as a warning. Threads may add together.
    """

    def __init__(self, most: int) -> None:
        """most: data.max_boxes."""
        self.most = most
        self._seen: set[str] = set()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, name: str) -> None:
        """Counts an image."""
        with self._lock:
            if not self._seen:
                log.warning(
                    "%s has more boxes than data.max_boxes=%d; those beyond are left out", name, self.most
                )
            self._seen.add(name)
