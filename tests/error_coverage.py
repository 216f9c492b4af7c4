"""
Which `raise` statements and `except` handlers no test executes: `python tests/error_coverage.py` after `make coverage`.

Reads `.coverage` of the working directory. A handler counts as executed if the first statement of its body was.
"""

import ast
import sys
from pathlib import Path

from coverage import CoverageData


ROOT = Path(__file__).parents[1]


def error_lines(source: str) -> list[tuple[int, str]]:
    """Line and kind of every `raise` and of the first statement of every `except`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            found.append((node.lineno, "raise"))
        elif isinstance(node, ast.ExceptHandler):
            found.append((node.body[0].lineno, "except"))
    return sorted(found)


def main() -> int:
    data = CoverageData()
    data.read()
    executed = {Path(name): set(data.lines(name) or ()) for name in data.measured_files()}
    total = missed = 0
    for path in sorted([*ROOT.glob("modeling_llava/**/*.py"), *ROOT.glob("conversion/**/*.py")]):
        source = path.read_text("utf-8")
        for line, kind in error_lines(source):
            total += 1
            if line not in executed.get(path, ()):
                missed += 1
                print(f"{path.relative_to(ROOT)}:{line}: {kind}: {source.splitlines()[line - 1].strip()}")
    print(f"{total - missed} of {total} raise statements and except handlers are executed by a test")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
