"""Text corpora from files: what goes in, what is left out, and that a corpus is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triptych.data_pipeline import CorpusReport, IndexedTokens, Manifest, TextCorpusOptions, TextTokenizer
from triptych.data_pipeline.building import is_held_out
from triptych.data_pipeline.sources import STDLIB, cut_units, find_files, read_unit
from triptych.data_pipeline.text import build_text_corpus

TEXTS = [f"document {i}\n" + "words and more words, and numbers {i}\n" * (i % 7) for i in range(60)]


def build(out: Path, *source: Path, **options: Any) -> CorpusReport:
    options = {"vocab_size": 300, "workers": 1, "valid_share": 0.2, **options}
    return build_text_corpus(TextCorpusOptions(source=tuple(map(str, source)), out=str(out), **options))


def documents(out: Path, *splits: str) -> list[str]:
    """The texts of a corpus, decoded, each checked for its end of document."""
    tokenizer = TextTokenizer.load(out)
    found = []
    for split in splits or ("train", "valid"):
        for tokens in IndexedTokens(out / split):
            assert tokens[-1] == tokenizer.eod_id
            found.append(tokenizer.decode(tokens[:-1].tolist()))
    return found


@pytest.fixture
def text_files(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for i, text in enumerate(TEXTS):
        path = root / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_text_files(text_files: Path, tmp_path: Path) -> None:
    report = build(tmp_path / "out", text_files)
    made = report.manifest
    assert sorted(documents(tmp_path / "out")) == sorted(TEXTS)
    held_out = [text for text in TEXTS if is_held_out(text, 0.2)]
    assert sorted(documents(tmp_path / "out", "valid")) == sorted(held_out)
    assert 3 < len(held_out) < 25
    assert made.splits["valid"]["documents"] == len(held_out)
    assert made.text_bytes == made.bytes_read == sum(len(text.encode()) for text in TEXTS)
    assert made.files_read == 60 and made.bad_count == made.empty == 0
    assert made.damage(tmp_path / "out") is None
    assert "60 files" in report.summary() and str(made.splits["train"]["tokens"]) in report.summary()


def test_jsonl_is_cut_at_any_byte_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of a few bytes: a line belongs to the unit in which it begins."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]), encoding="utf-8")
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr("triptych.data_pipeline.sources._UNIT_BYTES", size)
        units, bad = cut_units(find_files((str(path),), ()), "text")
        found = [text for unit in units for text in read_unit(unit, "text", "text").texts]
        assert found == TEXTS[:20] and not bad


def test_bad_json_lines_are_counted_and_named(tmp_path: Path) -> None:
    good = [json.dumps({"body": text}) for text in TEXTS]
    bad = ['{"body": "torn', '["body"]', '{"text": "elsewhere"}', '{"body": 3}', '{"body": "\\ud800"}']
    path = tmp_path / "lines.jsonl"
    path.write_bytes("\n".join([*good, *bad, "", '{"body": ""}']).encode() + b'\n{"body": "\xff"}')
    report = build(tmp_path / "out", path, jsonl_key="body")
    assert sorted(documents(tmp_path / "out")) == sorted(TEXTS)
    made = report.manifest
    assert (made.bad_count, made.empty) == (6, 1)
    for reason in (
        "broken JSON",
        "no object",
        "has: text",
        "no text but int",
        "not valid Unicode",
        "not UTF-8 at its byte 10",
    ):
        assert sum(reason in line for line in made.bad) == 1, f"{reason!r} is not named in {made.bad}"
    assert made.bad[0].startswith(f"lines.jsonl, line at byte {sum(len(line) + 1 for line in good)}: ")
    assert "left out as bad: 6" in report.summary()
    with pytest.raises(ValueError, match=r"bad input: lines.jsonl, line at byte .*strict=false"):
        build(tmp_path / "strict", path, jsonl_key="body", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_key_that_no_line_has_is_an_error_that_shows_the_keys(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"content": "x", "id": 1}\n')
    with pytest.raises(ValueError, match=r"no document is left .*no key 'text' \(has: content, id\)"):
        build(tmp_path / "out", tmp_path / "lines.jsonl")


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"body": [*TEXTS, None, ""], "id": list(range(62))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    report = build(tmp_path / "out", tmp_path / "a.parquet", parquet_column="body")
    assert sorted(documents(tmp_path / "out")) == sorted(TEXTS)
    assert report.manifest.empty == 2
    with pytest.raises(
        ValueError, match=r"a.parquet has no column 'text'; set parquet_column to one of body, id"
    ):
        build(tmp_path / "other", tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column 'id' of .*a.parquet holds int64, not text"):
        build(tmp_path / "other", tmp_path / "a.parquet", parquet_column="id")


def test_broken_parquet_and_undecodable_files_are_named(text_files: Path, tmp_path: Path) -> None:
    (text_files / "broken.parquet").write_bytes(b"PAR1 nothing of the kind")
    (text_files / "latin1.txt").write_bytes("größer".encode("latin-1"))
    (text_files / "empty.txt").write_bytes(b"")
    (text_files / "ignored.bin").write_bytes(b"\xff")
    made = build(tmp_path / "out", text_files).manifest
    assert made.bad_count == 2 and made.empty == 1
    assert made.bad[0].startswith("broken.parquet: broken Parquet")
    assert made.bad[1] == "latin1.txt: not UTF-8 at byte 2"
    assert sorted(documents(tmp_path / "out")) == sorted(TEXTS)


def test_the_result_does_not_depend_on_the_processes(
    text_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.data_pipeline.sources._UNIT_BYTES", 700)
    stages: list[tuple[str, int, int]] = []
    digests = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        options = TextCorpusOptions(source=str(text_files), out=str(out), vocab_size=280, workers=workers)
        report = build_text_corpus(options, lambda *stage: stages.append(stage))
        digests.append(report.manifest.files)
        done = [done for stage, done, total in stages if stage == "tokenize"]
        assert done == sorted(done) and done[-1] == report.manifest.bytes_read
        assert {stage for stage, _, _ in stages} == {"scan", "tokenizer", "tokenize"}
        stages.clear()
    assert digests[0] == digests[1]
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_the_tokenizer_never_sees_validation(tmp_path: Path) -> None:
    """A word that only held-out documents have gets no merge."""
    path = tmp_path / "lines.jsonl"
    texts = [f"common words {i}" for i in range(200)]
    texts = [text + " zqxjk" * 50 if is_held_out(text + " zqxjk" * 50, 0.2) else text for text in texts]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build(tmp_path / "out", path)
    assert len(TextTokenizer.load(tmp_path / "out").encode("zqxjk")) == 5


def test_a_given_tokenizer_is_used(text_files: Path, tmp_path: Path) -> None:
    build(tmp_path / "first", text_files)
    given = tmp_path / "first" / "tokenizer.json"
    made = build(tmp_path / "second", text_files, tokenizer=str(given), vocab_size=999).manifest
    assert (tmp_path / "second" / "train.bin").read_bytes() == (tmp_path / "first" / "train.bin").read_bytes()
    assert made.tokenizer_digest == TextTokenizer.load(given).digest and made.notes == []


@pytest.mark.parametrize("length", [400, 5000])
def test_one_long_document_is_split_at_its_tail(tmp_path: Path, length: int) -> None:
    text = "".join(f"line {i}\n" for i in range(length))
    (tmp_path / "one.txt").write_text(text)
    made = build(tmp_path / "out", tmp_path / "one.txt", valid_share=0.1).manifest
    tokenizer = TextTokenizer.load(tmp_path / "out")
    train, valid = (IndexedTokens(tmp_path / "out" / split) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (1, 1)
    assert tokenizer.decode([*train.flat.tolist(), *valid.flat.tolist()[:-1]]) == text
    assert valid.num_tokens == pytest.approx(0.1 * (train.num_tokens + valid.num_tokens), abs=1)
    assert any("the last 10.0% of the tokens are for validation" in note for note in made.notes)
    assert made.damage(tmp_path / "out") is None


def test_no_validation_if_none_is_wanted(text_files: Path, tmp_path: Path) -> None:
    made = build(tmp_path / "out", text_files, valid_share=0.0).manifest
    assert list(made.splits) == ["train"] and not (tmp_path / "out" / "valid.bin").exists()


def test_a_whole_corpus_is_found_again(text_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build(out, text_files)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = build(out, text_files, workers=2)
    assert again.reused and not first.reused and again.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


@pytest.mark.parametrize("fault", ["flipped", "missing", "truncated"])
def test_a_damaged_corpus_is_built_again(text_files: Path, tmp_path: Path, fault: str) -> None:
    out = tmp_path / "out"
    build(out, text_files)
    path, whole = out / "train.bin", (out / "train.bin").read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-2] if fault == "truncated" else bytes([whole[0] ^ 1]) + whole[1:])
    report = build(out, text_files)
    assert not report.reused and path.read_bytes() == whole
    assert any(f"replaced the corpus in {out}: {path}" in note for note in report.manifest.notes)


def test_changed_input_is_read_again_and_other_options_refused(text_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, text_files)
    (text_files / "part0" / "00.txt").write_text("something else")
    assert not build(out, text_files).reused
    assert "something else" in documents(out)
    with pytest.raises(
        ValueError, match=r"made with other options \(vocab_size: 300 -> 310\); .*overwrite=true"
    ):
        build(out, text_files, vocab_size=310)
    assert build(out, text_files, vocab_size=310, overwrite=True).manifest.vocab_size == 310


def test_a_directory_of_something_else_is_not_touched(text_files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not empty and holds no corpus of ours; name another directory"):
        build(text_files, text_files)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a directory"):
        build(tmp_path / "file", text_files)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json cannot be used .*overwrite=true"):
        build(tmp_path / "old", text_files)
    assert not build(tmp_path / "old", text_files, overwrite=True).reused


def test_a_failed_build_leaves_things_as_they_were(
    text_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while the manifest is written: the old corpus stands, nothing half-made remains."""
    out = tmp_path / "out"
    build(out, text_files)
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}

    def full(self: Manifest, directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Manifest, "write", full)
    with pytest.raises(OSError, match="No space left"):
        build(out, text_files, vocab_size=310, overwrite=True)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out", ".out.lock"}


def test_leftovers_of_a_killed_build_are_removed(text_files: Path, tmp_path: Path) -> None:
    (tmp_path / ".out[1].building-killed").mkdir()
    build(tmp_path / "out[1]", text_files)
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out[1]", ".out[1].lock"}


def test_two_builders_of_one_corpus_build_it_once(text_files: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        reports = list(threads.map(lambda _: build(tmp_path / "out", text_files), range(2)))
    assert sorted(report.reused for report in reports) == [False, True]
    assert reports[0].manifest == reports[1].manifest


def test_input_that_changes_under_the_builder_is_refused(
    text_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(stage: str, done: int, total: int) -> None:
        if stage == "tokenize":
            with open(text_files / "part0" / "00.txt", "a") as file:
                file.write("x")

    options = TextCorpusOptions(source=str(text_files), out=str(tmp_path / "out"), workers=1)
    with pytest.raises(RuntimeError, match="changed while it was read"):
        build_text_corpus(options, append)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"source .*nowhere does not exist; give 'stdlib', a file or a directory"
    ):
        build(tmp_path / "out", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no file ending in .txt, .md"):
        build(tmp_path / "out", tmp_path / "empty")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="reached from two sources"):
        build(tmp_path / "out", tmp_path / "a.txt", tmp_path)
    with pytest.raises(ValueError, match=r"no document is left .*: all are empty"):
        build(tmp_path / "out", tmp_path / "a.txt")


def test_the_standard_library_is_found() -> None:
    """A few hundred files and more on every machine; none of the installed packages."""
    files = find_files((STDLIB,), ())
    names = {file.name for file in files}
    assert len(files) > 300 and sum(file.size for file in files) > 5_000_000
    assert {"os.py", os.path.join("json", "decoder.py")} <= names
    assert not any("site-packages" in name or not name.endswith(".py") for name in names)
    assert all(file.path.startswith(sysconfig.get_paths()["stdlib"]) for file in files)
