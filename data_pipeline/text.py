"""Text corpora: `triptych data text`. Files become train/valid token files, a tokenizer and a manifest.

    files --cut--> units --read--> documents --split by hash of content--> train | valid
                                    |                                        |
                 a subset of units, training documents only             tokenized by processes,
                            --> byte-level BPE                          written in order of units

Deterministic: units, order, split and tokenizer are functions of the input files and the options; the
number of processes only changes the time. Atomic: everything is written to a temporary directory beside
`out` and renamed. A directory that already holds the corpus asked for is checked and left as it is.

The hash is taken over the content, so copies of a document fall on the same side of the split.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from triptych.data_pipeline.building import Builder, Fingerprint, Progress
from triptych.data_pipeline.config import TextCorpusOptions
from triptych.data_pipeline.manifest import NAME, CorpusReport, Manifest
from triptych.data_pipeline.sources import InputFile, find_files, inputs_digest
from triptych.data_pipeline.tokenizer import TextTokenizer
from triptych.data_pipeline.workspace import only_builder, replacement

# Options that do not change what is built.
_INDIFFERENT = {"out", "workers", "overwrite"}


def build_text_corpus(options: TextCorpusOptions, progress: Progress | None = None) -> CorpusReport:
    """Builds the corpus in options.out, or finds it there. See TextCorpusOptions and the head of this file.

    Raises ValueError for input that a user can mend (no such source, a Parquet column that is not there,
    no document left, `out` taken by something else); OSError if the disk refuses; in both cases `out` is
    as it was before.
    """
    started = time.monotonic()
    report_progress = progress or (lambda stage, done, total: None)
    files = find_files(options.source, options.extensions)
    report_progress("scan", len(files), len(files))
    out = Path(os.path.abspath(options.out))
    with only_builder(out):
        wanted = _fingerprint(options, files)
        note = None
        if (found := _existing(out, options, wanted)) is not None:
            damage = found.damage(out)
            if damage is None and _same(found, wanted):
                return CorpusReport(options.out, True, time.monotonic() - started, found)
            note = f"replaced the corpus in {out}: {damage or 'its input files or options changed'}"
        with replacement(out) as workspace:
            manifest = Builder(options, files, workspace, report_progress).build(wanted, note)
    return CorpusReport(options.out, False, time.monotonic() - started, manifest)


def _fingerprint(options: TextCorpusOptions, files: list[InputFile]) -> Fingerprint:
    relevant = options.model_dump(mode="json", exclude=_INDIFFERENT)
    if options.tokenizer is not None:
        # A given tokenizer is known by its content; its path may come to hold another one.
        relevant["tokenizer"] = TextTokenizer.load(options.tokenizer, eod_token=options.eod_token).digest
    return Fingerprint(relevant, inputs_digest(files))


def _same(found: Manifest, wanted: Fingerprint) -> bool:
    return found.options == wanted.options and found.inputs_digest == wanted.inputs_digest


def _existing(out: Path, options: TextCorpusOptions, wanted: Fingerprint) -> Manifest | None:
    """The manifest of the corpus in `out`, None if `out` is free; ValueError if it may not be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a directory")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / NAME).is_file():
        raise ValueError(f"out={out} is not empty and holds no corpus of ours; name another directory")
    try:
        found = Manifest.read(out)
    except ValueError:
        if options.overwrite:
            return None
        raise
    assert found is not None, "the manifest was there a moment ago"
    changed = [
        f"{key}: {found.options.get(key)} -> {value}"
        for key, value in wanted.options.items()
        if found.options.get(key) != value
    ]
    if changed and not options.overwrite:
        raise ValueError(
            f"out={out} holds a corpus made with other options ({'; '.join(changed)}); "
            "name another directory or set overwrite=true"
        )
    return found
