"""Functions of Python's standard library, whose source every Python brings along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvzip_press.leaderboard.samples.functions import Function, FunctionTask, functions_in, one_a_name
from kvzip_press.leaderboard.samples.installed import python_revision, standard_library

#: Modules in Python that all versions from 3.11 on have.
MODULES = (
    "ast.py", "base64.py", "bisect.py", "calendar.py", "cmd.py", "code.py", "codecs.py", "colorsys.py", "compileall.py",
    "contextlib.py", "copy.py", "csv.py", "datetime.py", "difflib.py", "dis.py", "filecmp.py", "fileinput.py",
    "fnmatch.py", "fractions.py", "functools.py", "getopt.py", "getpass.py", "gettext.py", "glob.py", "gzip.py",
    "hashlib.py", "heapq.py", "hmac.py", "inspect.py", "io.py", "ipaddress.py", "keyword.py", "linecache.py",
    "locale.py", "lzma.py", "mailbox.py", "mimetypes.py", "ntpath.py", "numbers.py", "opcode.py", "os.py", "pickle.py",
    "pickletools.py", "pkgutil.py", "platform.py", "plistlib.py", "posixpath.py", "pprint.py", "py_compile.py",
    "pyclbr.py", "pydoc.py", "random.py", "re/__init__.py", "runpy.py", "secrets.py", "shlex.py", "shutil.py",
    "site.py", "socket.py", "ssl.py", "stat.py", "statistics.py", "string.py", "struct.py", "subprocess.py",
    "sysconfig.py", "tarfile.py", "tempfile.py", "textwrap.py", "threading.py", "timeit.py", "token.py", "tokenize.py",
    "trace.py", "traceback.py", "types.py", "typing.py", "urllib/parse.py", "urllib/request.py", "uuid.py",
    "warnings.py", "wave.py", "weakref.py", "webbrowser.py", "zipfile.py",
)  # fmt: skip


@dataclass(frozen=True)
class StdlibFunctionsTask(FunctionTask):
    """Functions of the standard library of the Python that runs; `data_revision` says which."""

    name: str = "stdlib_functions"

    @property
    def data_revision(self) -> str:  # type: ignore[override]
        """Python's version, and the hash of the functions."""
        return python_revision(*(f"{one.name}\0{one.description}\0{one.source}" for one in self.functions))

    @cached_property
    def functions(self) -> Sequence[Function]:
        """The functions; raises as `standard_library` does."""
        return one_a_name(one for module in MODULES for one in functions_in(standard_library(module)))
