"""What starting Java programs needs again and again, kept from one run of the tests to the next."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "pgsignals-tests"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def kept_classpath(pom: Path, find: Callable[[], str]) -> str:
    """The class path of a POM, asked for only where it is not known or its files are gone."""
    name = hashlib.sha256(pom.read_bytes()).hexdigest()[:16]
    kept = _folder() / f"{name}.classpath"
    if kept.exists() and all(map(os.path.exists, kept.read_text().split(os.pathsep))):
        return kept.read_text()
    found = find()
    own = kept.with_suffix(f".{os.getpid()}")
    own.write_text(found)
    own.replace(kept)
    return found


@functools.cache
def _archive_path(classpath: str) -> Path:
    java = os.path.realpath(shutil.which("java") or "java")
    known = f"{java} {os.stat(java).st_mtime_ns} {classpath}"
    return _folder() / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.jsa"


def archived(classpath: str) -> list[str]:
    """Options for Java to take classes ready for use from an archive, if there is one.

    One that Java cannot use is as good as none, and what Java says of it no output of a program.
    """
    path = _archive_path(classpath)
    quiet = ["-Xlog:disable", "-Xlog:all=error:stderr"]
    return [f"-XX:SharedArchiveFile={path}", *quiet] if path.exists() else []


def make_archive(classpath: str, run: Callable[[str], None]) -> None:
    """Make the archive, unless it is there, or somebody else makes it.

    ``run`` is given an option, and runs with it what is to start fast from then on, to its end.
    """
    path = _archive_path(classpath)
    if path.exists():
        return
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        own = path.with_suffix(f".{os.getpid()}")
        run(f"-XX:ArchiveClassesAtExit={own}")
        if own.exists():
            own.replace(path)
