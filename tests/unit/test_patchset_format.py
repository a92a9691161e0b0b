"""Patch and series files: what is read, and what is refused with file, hunk and line."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patch_trees import ENGINE, FIELDS, PATCHED, patch_text, write_set

from dflash_plugin import patchset
from dflash_plugin.errors import PatchConflictError, PatchError, PatchVersionError

TEXT = patch_text(ENGINE, PATCHED)
FIRST_HUNK = r"vllm/draft.py: hunk @@ -1,7 \+1,7 @@"


def test_what_is_in_a_patch():
    found = patchset.parse(TEXT, "fix-it.patch")
    assert (found.subject, found.author) == ("Fix it", "Somebody <some@body.org>")
    assert found.fields["Effect"] == "every draft is wrong, measured on two pairs"
    assert found.message == f"Fix it\n\nIt was broken.\n\n{FIELDS}\n"
    assert [(f.path, f.adds, f.deletes, len(f.hunks)) for f in found.files] == [
        ("vllm/draft.py", False, False, 2),
        ("vllm/v1/new/file.py", True, False, 1),
        ("vllm/v1/old.py", False, True, 1),
    ]
    assert found.replaces_shims == ()
    fields = f"{FIELDS}\nReplaces-Shim: one-thing,\n another"
    assert patchset.parse(patch_text(ENGINE, PATCHED, fields=fields), "x.patch").replaces_shims == (
        "one-thing",
        "another",
    )


def test_git_format_patch_is_read_whole(tmp_path):
    """The command in the module's docstring, with a summary of changes."""

    def git(*args: str) -> str:
        command = ["git", "-c", "user.name=Some Body", "-c", "user.email=a@b", *args]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "x.py").write_text("".join(f"{n}\n" for n in range(20)))
    git("add", ".")
    git("commit", "-qm", "Base")
    (tmp_path / "x.py").write_text("".join(f"{n}\n" for n in range(21) if n != 4))
    git("commit", "-qam", f"Count on\n\n{FIELDS}")
    options = ["--zero-commit", "--full-index", "--no-renames", "--no-signature", "-N"]
    text = git("format-patch", "--stdout", *options, "-1")
    (file,) = patchset.parse(text, "count-on.patch").files
    assert (file.path, [str(hunk) for hunk in file.hunks]) == (
        "x.py",
        ["@@ -2,7 +2,6 @@", "@@ -18,3 +17,4 @@"],
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("From 0000", "From 0001", r"fix-it\.patch:1: expected 'From 0000"),
        ("From: Somebody <", "From: <", ":2: expected `From: Name <mail>`"),
        ("+0000\n", "\n", ":3: .* is not a date"),
        ("Fix it", "Fix it" * 20, ":4: expected a subject of at most"),
        ("Fix it", "Fíx it", "other than ASCII"),
        ("[PATCH] ", "", ":4: expected 'Subject: "),
        ("Bug: none\n", "", "missing fields: Bug"),
        ("Bug: none\n", "Bug: none\nBug: none\n", "field Bug is there twice"),
        ("Bug: none\n", "Bugs: none\n", "unknown field Bugs"),
        ("Bug: none\n", "bug\n", "expected `Field: value`, found 'bug'"),
        ("2026-11-22", "soon", "Last-Update: "),
        ("Origin: vendor\n", "Origin: vendor \n", "blanks at the end"),
        ("\n---\n\ndiff", "\n\ndiff", "no line `---`"),
        ("\n---\n\n", "\n---\nwhat\n", "expected the summary"),
        ("a/vllm/draft.py b/vllm/draft.py", "a/vllm/draft.py b/vllm/other.py", "of one file"),
        ("vllm/v1/old.py", "vllm/../../old.py", "empty, `.` or `..`"),
        ("vllm/v1/old.py", "/etc/old.py", "empty, `.` or `..`|relative"),
        ("vllm/v1/old.py", "vllm//old.py", "empty, `.` or `..`"),
        ("vllm/v1/old.py", "vllm/o,d.py", "has a blank, comma"),
        ("vllm/v1/old.py", "vllm/draft.py", "is in it twice|expected 'diff"),
        ("index ", "old mode 100644\nnew mode 100755\nindex ", "only text files"),
        ("index ", "similarity index 90%\nindex ", "only text files"),
        ("index ", "rename from x\nindex ", "only text files"),
        (" 100644\n--- ", " 120000\n--- ", "`index` with two whole ids"),
        (" 100644\n--- ", "\n--- ", "mode of vllm/draft.py is missing"),
        ("--- a/vllm/draft.py", "--- a/vllm/other.py", "expected '--- a/vllm/draft.py'"),
        ("--- a/vllm/draft.py", "Binary files differ", "expected '--- '"),
        ("@@ -1,7 +1,7 @@", "@@ -1,7 1,7 @@", "is not a hunk's heading"),
        ("@@ -1,7 +1,7 @@", "@@ -2,7 +1,7 @@", FIRST_HUNK.replace("-1", "-2")),
        ("@@ -1,7 +1,7 @@", "@@ -1,6 +1,7 @@", "more lines than its heading|truncated"),
        ("@@ -1,7 +1,7 @@", "@@ -1,8 +1,8 @@", "promises 8 old and 8 new lines"),
        ("+LINE 3\n", "", f"{FIRST_HUNK} promises 7 old and 7 new lines; 0 and 1 of them"),
        (" line 1\n", "line 1\n", "promises 7 old"),
        ("+LINE 3\n", "+line 3\n", "changes nothing"),
        (" line 5\n", " line 5\n\\ No newline at end of file\n", "without a newline that is not"),
    ],
)
def test_other_forms_are_refused(old, new, words):
    text = TEXT.replace(old, new)
    assert text != TEXT
    with pytest.raises(PatchError, match=words) as err:
        patchset.parse(text, "fix-it.patch")
    assert err.value.message.startswith("fix-it.patch:")
    assert not isinstance(err.value, PatchConflictError)


def test_carriage_returns_are_refused_with_their_place():
    with pytest.raises(PatchError, match=r"^fix-it\.patch:1: has a carriage return"):
        patchset.parse(TEXT.replace("\n", "\r\n"), "fix-it.patch")
    text = TEXT.replace("+LINE 3\n", "+LINE 3\r\n")
    with pytest.raises(PatchError, match=rf":27: {FIRST_HUNK} has a carriage return"):
        patchset.parse(text, "fix-it.patch")


@given(st.integers(0, len(TEXT) - 1))
def test_a_truncated_patch_is_refused(length):
    """But at the end of a file's part, where what is left is a patch: its ids tell then."""
    cut = TEXT[:length]
    parts = TEXT.split("diff --git ")
    whole = {len("diff --git ".join(parts[:n])) for n in range(2, len(parts))}
    hunk = TEXT.index("@@ -18")  # between two hunks of a file
    if length in whole:
        assert len(patchset.parse(cut, "x.patch").files) < 3
    elif length == hunk:
        (file,) = patchset.parse(cut, "x.patch").files
        new = patchset.apply_text(file, ENGINE["vllm/draft.py"])
        assert patchset.blob_id(new.encode()) != file.new_blob
    else:
        with pytest.raises(PatchError, match=r"^x\.patch:\d+: "):
            patchset.parse(cut, "x.patch")


def test_hunks_apply_where_they_say_and_nowhere_else():
    file = patchset.parse(TEXT, "fix-it.patch").files[0]
    old = ENGINE[file.path]
    assert patchset.apply_text(file, old) == PATCHED[file.path]
    with pytest.raises(PatchConflictError) as err:
        patchset.apply_text(file, "one more line\n" + old)
    assert (err.value.path, err.value.hunk, err.value.line) == (file.path, 1, 1)
    with pytest.raises(PatchConflictError) as err:
        patchset.apply_text(file, old.replace("line 21\n", "line 21 \n"))
    assert (err.value.hunk, err.value.line) == (2, 22)
    assert "fix-it.patch: vllm/draft.py: hunk 2 (@@ -18,7 +18,6 @@)" in str(err.value)
    assert "expected 'line 21\\n', found 'line 21 \\n'" in str(err.value)
    with pytest.raises(PatchConflictError, match="CRLF"):
        patchset.apply_text(file, old.replace("\n", "\r\n"))
    with pytest.raises(PatchConflictError, match="the end of the file"):
        patchset.apply_text(file, old[: old.index("line 21")])
    with pytest.raises(PatchConflictError, match="no such file"):
        patchset.apply_text(file, None)
    with pytest.raises(PatchConflictError, match=r"hunk 1 .* found 'LINE 3\\n'"):
        patchset.apply_text(file, PATCHED[file.path])


def test_files_that_are_added_and_deleted():
    _, added, deleted = patchset.parse(TEXT, "fix-it.patch").files
    assert patchset.apply_text(added, None) == PATCHED[added.path]
    with pytest.raises(PatchConflictError, match="is there already"):
        patchset.apply_text(added, "")
    assert patchset.apply_text(deleted, ENGINE[deleted.path]) is None
    with pytest.raises(PatchConflictError, match="lines that the patch"):
        patchset.apply_text(deleted, ENGINE[deleted.path] + "more = 1\n")


lines = st.lists(
    st.sampled_from(["a\n", "b\n", "c\n", "\n", "\x0c\n", "\u2028\n", "@@ x\n", "-- \n"])
)
texts = st.tuples(lines, st.sampled_from(["", "end"])).map(lambda t: "".join(t[0]) + t[1])


@given(texts, texts)
def test_apply_and_reverse_are_inverse(old, new):
    if old == new:
        return
    (file,) = patchset.parse(patch_text({"x.py": old}, {"x.py": new}), "x.patch").files
    assert patchset.apply_text(file, old) == new
    assert patchset.apply_text(patchset.reverse(file), new) == old
    assert patchset.reverse(patchset.reverse(file)) == file


def test_a_set_is_read_from_its_series(tmp_path):
    folder = write_set(tmp_path, [ENGINE, PATCHED, ENGINE])
    (folder / "series").write_text("# first\n# of two\nfix-it-0.patch\nfix-it-1.patch\n")
    found = patchset.load(tmp_path, "vllm", "0.24.0", "swa")
    assert [patch.name for patch in found.patches] == ["fix-it-0.patch", "fix-it-1.patch"]
    assert found.comments == (("first", "of two"), ())
    assert found.paths == ("vllm/draft.py", "vllm/v1/new/file.py", "vllm/v1/old.py")
    assert patchset.available(tmp_path) == [("vllm", "0.24.0", "swa")]
    write_set(tmp_path, [ENGINE, PATCHED], version="0.25.0")
    other = patchset.load(tmp_path, "vllm", "0.25.0", "swa")
    assert other.sha256 != found.sha256


@pytest.mark.parametrize(
    ("series", "words"),
    [
        ("fix-it-0.patch\n", None),
        ("fix-it-0.patch", "series: .*a newline after it"),
        ("", "expected a patch on the last line"),
        ("fix-it-0.patch\n# end\n", "expected a patch on the last line"),
        ("fix-it-0.patch\n\n", "series:2: expected"),
        ("fix-it-0.patch\r\n", "series:1: expected"),
        ("../fix-it-0.patch\n", "series:1: expected"),
        ("Fix.patch\n", "series:1: expected"),
        ("fix-it-0.patch\nfix-it-0.patch\n", "series:2: fix-it-0.patch is listed twice"),
        ("fix-it-0.patch\nother.patch\n", "other.patch: listed in the series, and not there"),
        ("fix-it-1.patch\nfix-it-0.patch\n", "not as fix-it-1.patch leaves it"),
    ],
)
def test_series_files(tmp_path, series, words):
    third = {**PATCHED, "vllm/draft.py": "short\n"}
    folder = write_set(tmp_path, [ENGINE, PATCHED, third])
    (folder / "series").write_bytes(series.encode())
    if words is None:
        patchset.load(tmp_path, "vllm", "0.24.0", "swa")
        return
    with pytest.raises(PatchError, match=words):
        patchset.load(tmp_path, "vllm", "0.24.0", "swa")


def test_sets_that_are_not_there(tmp_path):
    write_set(tmp_path, [ENGINE, PATCHED])
    with pytest.raises(PatchVersionError, match=r"no patch set 'cpu' for vllm 0\.24\.0") as err:
        patchset.load(tmp_path, "vllm", "0.24.0", "cpu")
    assert err.value.hint == "there are: swa"
    with pytest.raises(PatchVersionError) as err:
        patchset.load(tmp_path, "vllm", "0.25.0", "swa")
    assert err.value.hint == "releases of vllm with patch sets: 0.24.0"
    with pytest.raises(PatchVersionError):
        patchset.load(tmp_path / "nowhere", "sglang", "0.5", "swa")
