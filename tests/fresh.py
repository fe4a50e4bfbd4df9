"""Run a few lines in a fresh interpreter: what was imported here must not count there."""

import json
import subprocess
import sys

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ImportError(f'{{name}} is blocked in this test')
sys.meta_path.insert(0, Block())
"""


def modules_after(code, blocked=()):
    """Top-level and stretto modules in `sys.modules` after running `code`, as a set of names.

    Importing a library named in `blocked` raises there, which fails the calling test.
    """
    lines = [BLOCK.format(blocked=tuple(blocked)), code, "import json, sys"]
    lines.append("print('\\n' + json.dumps(sorted(sys.modules)))")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))
